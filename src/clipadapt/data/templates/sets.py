"""Sentences for class names: the published template sets, kept as data files next to this one, or a user's own.

A set of templates is a text file with one template a line (`openai-80.txt`); `conventions.json` holds the one
template that each published code base uses for each of the eleven few-shot data sets, and `class_names.json` how
that field renames the folders of three of them. Sources: the notebook "Prompt Engineering for ImageNet" of
OpenAI's CLIP (the 80 and the 7; the 8 are the 7 and "a photo of a {}."), and the code of CoOp (arXiv 2109.01134;
the same in Tip-Adapter, APE, GDA-CLIP and LP++), KgCoOp (2303.13283), ProGrad (2205.14865), CLIP-LoRA (2405.18541)
and TransCLIP (2406.01837).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from clipadapt.data.examples import Dataset
from clipadapt.errors import DataError, unknown_name

Templates = str | Path | Sequence[str] | Mapping[str, str | Sequence[str]]

_HERE = Path(__file__).parent


def class_texts(class_names: Sequence[str], templates: Templates = "photo") -> list[list[str]]:
    """For each of the C classes its sentences; underscores in a class name become spaces.

    Args:
        class_names: C names.
        templates: one of
            - the name of a shipped set (`template_sets()`): "photo", "imagenet-7", "openai-80", "pets"
              (CoOp's template for that data set) or "prograd/pets" (another code base's);
            - a template with "{}" where the class name goes, or a list of them;
            - a mapping from class name to its own sentences, such as descriptions by a language model;
            - the path of a file that holds templates (.txt, one per line; .json or .yaml, a list) or such a mapping
              (.json or .yaml; .txt with a line "class name: sentence" for each sentence).

    Raises:
        DataError: a template lacks its "{}", a class has no sentences, or a file cannot be read.
        ClipadaptError: no set has that name.
    """
    chosen = _resolve(templates)
    if isinstance(chosen, Mapping):
        return [_own_sentences(name, chosen) for name in class_names]
    for template in chosen:
        if "{}" not in template:
            raise DataError(f"The template {template!r} lacks the {{}} where the class name goes.")
    if not chosen:
        raise DataError("The list of templates is empty; at least one is needed.")
    return [[template.replace("{}", name.replace("_", " ")) for template in chosen] for name in class_names]


def template_sets() -> list[str]:
    """The names of all shipped template sets, sorted."""
    return sorted(_shipped_sets())


def with_published_names(data: Dataset, published: str) -> Dataset:
    """`data`, read from the folders of a public data set, under the class names that CoOp's splits give it.

    Args:
        published: "caltech101" (two classes dropped, four renamed), "eurosat" (long names) or "ucf101"
            ("ApplyEyeMakeup" becomes "Apply_Eye_Makeup").
    """
    rules = json.loads((_HERE / "class_names.json").read_text(encoding="utf-8"))
    if published not in rules:
        raise unknown_name("data set with its own class names", published, rules)
    rule = rules[published]
    data = data.only([name for name in data.class_names if name not in rule.get("drop", ())])
    names = {old: new for old, new in rule.get("rename", {}).items() if old in data.class_names}
    if rule.get("split_capitals"):
        names = {name: "_".join(re.findall("[A-Z][^A-Z]*", name)) or name for name in data.class_names}
    return data.rename(names)


def _resolve(templates: Templates) -> Sequence[str] | Mapping[str, str | Sequence[str]]:
    if isinstance(templates, Path):
        return _read(templates)
    if not isinstance(templates, str):
        return templates
    if "{}" in templates:
        return [templates]
    if templates in _shipped_sets():
        return _shipped_sets()[templates]
    if templates.lower().endswith((".txt", ".json", ".yaml", ".yml")):
        return _read(Path(templates))
    if " " in templates:
        raise DataError(f"The template {templates!r} lacks the {{}} where the class name goes.")
    raise unknown_name("template set", templates, _shipped_sets())


@cache
def _shipped_sets() -> dict[str, list[str]]:
    """name -> templates."""
    conventions = json.loads((_HERE / "conventions.json").read_text(encoding="utf-8"))
    sets = {file.stem: _lines(file.read_text(encoding="utf-8")) for file in _HERE.glob("*.txt")}
    sets |= {data: [template] for data, template in conventions["coop"].items()}
    for convention, by_data in conventions.items():
        sets |= {f"{convention}/{data}": [template] for data, template in by_data.items()}
    return sets


def _read(file: Path) -> Sequence[str] | Mapping[str, str | Sequence[str]]:
    kind = file.suffix.lower()
    try:
        text = file.read_text(encoding="utf-8-sig")
        content: Any = json.loads(text) if kind == ".json" else yaml.safe_load(text) if kind != ".txt" else _lines(text)
    except OSError as error:
        raise DataError(f"The template file {file} cannot be read: {error.strerror}.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"The template file {file} is damaged: {error}.") from None
    if kind == ".txt" and content and all(": " in line and "{}" not in line for line in content):
        named: dict[str, list[str]] = {}
        for name, sentence in (line.split(": ", 1) for line in content):
            named.setdefault(name.strip(), []).append(sentence.strip())
        return named
    if isinstance(content, list) and all(isinstance(template, str) for template in content):
        return content
    if isinstance(content, dict):
        return {str(name): sentences for name, sentences in content.items()}  # YAML reads the class 7 as a number
    raise DataError(f"The template file {file} must hold a list of templates or {{class name: [sentences]}}.")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _own_sentences(name: str, sentences: Mapping[str, str | Sequence[str]]) -> list[str]:
    own = sentences.get(name, sentences.get(name.replace("_", " ")))
    own = [own] if isinstance(own, str) else own
    if not isinstance(own, Sequence) or not own or not all(isinstance(sentence, str) for sentence in own):
        raise DataError(f"The class {name!r} has no list of sentences; each class needs at least one.")
    return list(own)
