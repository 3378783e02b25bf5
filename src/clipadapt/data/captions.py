"""Sentences that name classes: read, made, and labelled by the names among their words."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipadapt.errors import DataError, unknown_name

_IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "mouse": "mice", "ox": "oxen", "knife": "knives", "leaf": "leaves", "wolf": "wolves",
    "shelf": "shelves", "calf": "calves", "loaf": "loaves", "scarf": "scarves",
}  # fmt: skip

_PATTERNS = {
    2: ("a photo of {} and {}.", "{} and {}", "{} next to {}.", "a picture that shows {} with {}."),
    3: ("a photo of {}, {} and {}.", "{}, {} and {}", "{} next to {} and {}.", "a picture of {} and {}, with {}."),
}


def plural(noun: str) -> str:
    """The plural of an English noun or of the last word of several, by the regular rules and some exceptions."""
    start, last = re.fullmatch(r"(.*?)([^ -]*)", noun).groups()  # type: ignore[union-attr]
    if last in _IRREGULAR:
        return start + _IRREGULAR[last]
    if re.search("(s|x|z|ch|sh)$", last):
        return noun + "es"
    if re.search("[^aeiou]y$", last):
        return noun[:-1] + "ies"
    return noun + "s"


def named_classes(
    sentences: Iterable[str], class_names: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None
) -> list[frozenset[int]]:
    """For each sentence the classes it names: by their name, a synonym, or the plural of either, as whole words.

    Where names overlap ("hot dog", "dog") the one of most words counts alone. Upper and lower case are the same.

    Args:
        sentences: S sentences.
        class_names: C names; underscores count as spaces.
        synonyms: further words for some of the classes, {class name: [words]}.

    Raises:
        ClipadaptError: a synonym is for a class that there is not.
    """
    synonyms = synonyms or {}
    for name in synonyms:
        if name not in class_names:
            raise unknown_name("class", name, class_names)
    classes: dict[str, set[int]] = {}
    for c, name in enumerate(class_names):
        for term in (name, *synonyms.get(name, ())):
            term = " ".join(term.lower().replace("_", " ").split())
            for form in (term, plural(term)):
                classes.setdefault(form, set()).add(c)
    longest_first = sorted(classes, key=lambda form: (-form.count(" "), -len(form), form))
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    return [
        frozenset(c for found in pattern.findall(" ".join(sentence.lower().split())) for c in classes[found])
        for sentence in sentences
    ]


def read_captions(captions: str | Path | Iterable[str]) -> list[str]:
    """Sentences from a list, a text file (one per line), or a .jsonl file of strings or of objects with a "caption"."""
    if not isinstance(captions, str | Path):
        return list(captions)
    path = Path(captions)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The captions {path} cannot be read: {error}.") from None
    if path.suffix.lower() != ".jsonl":
        return lines
    sentences = []
    for number, line in enumerate(lines, start=1):
        try:
            row: Any = json.loads(line)
            sentence = row if isinstance(row, str) else row["caption"]
            if not isinstance(sentence, str):
                raise TypeError(f"a caption is {sentence!r}")
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{path}: entry {number} is neither a string nor an object with a "caption".') from None
        sentences.append(sentence)
    return sentences


def made_sentences(class_names: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` sentences that each name two or three classes at random; the order of the names does not matter."""
    rng, names = random.Random(seed), sorted(name.replace("_", " ") for name in class_names)
    sentences = []
    for _ in range(count):
        chosen = rng.sample(names, rng.randint(2, min(3, len(names))))
        things = [f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}" for name in chosen]
        sentences.append(rng.choice(_PATTERNS[len(chosen)]).format(*things))
    return sentences
