"""WordNet's nouns for things: what each is called, what the dictionary says of it, how often it is spoken of.

Princeton University, WordNet 3.0, in the files of Debian's `wordnet-base`. Nothing of them ships with this library.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clipadapt.errors import DataError

THING = "n00001930"  # "physical entity"
_FOLDER = "usr/share/wordnet"


@dataclass(frozen=True)
class Sense:
    """One meaning of a noun.

    id        "n" and its place in the file, as ImageNet names its classes: "n02123045"
    names     what it is called, the commonest first
    gloss     the dictionary's explanation, without its examples
    above     ids of what it is a kind of
    named     whether it is a single named thing ("Mount Fuji"), and no kind of thing
    """

    id: str
    names: tuple[str, ...]
    gloss: str
    above: tuple[str, ...]
    named: bool


class WordNet:
    """The nouns of an unpacked `wordnet-base`.

    senses  by id
    """

    def __init__(self, unpacked: Path) -> None:
        self._folder = unpacked / _FOLDER
        if not (self._folder / "data.noun").is_file():
            raise DataError(f"{unpacked} holds no WordNet: {_FOLDER}/data.noun is missing.")
        self.senses = {sense.id: sense for sense in map(_sense, self._lines("data.noun"))}

    def _lines(self, name: str) -> list[str]:
        text = (self._folder / name).read_text(encoding="latin-1")
        return [line for line in text.splitlines() if not line.startswith("  ")]  # the licence is indented

    @cached_property
    def things(self) -> dict[str, Sense]:
        """Every noun whose first meaning is a kind of physical thing, with that meaning; in alphabetical order."""
        found = {}
        for line in self._lines("index.noun"):
            fields = line.split()
            first = self.senses[f"n{fields[-int(fields[2])]}"]
            if not first.named and self._is_thing(first):
                found[fields[0].replace("_", " ")] = first
        return dict(sorted(found.items()))

    @cached_property
    def frequency(self) -> Counter[str]:
        """How often WordNet's tagged texts have each noun."""
        counts: Counter[str] = Counter()
        for line in self._lines("cntlist.rev"):
            key, _, count = line.split()
            name, _, rest = key.partition("%")
            if rest.startswith("1"):  # a noun
                counts[name.replace("_", " ")] += int(count)
        return counts

    def _is_thing(self, sense: Sense) -> bool:
        seen, above = set(), [sense.id]
        while above:
            one = above.pop()
            if one == THING:
                return True
            if one not in seen:
                seen.add(one)
                above += self.senses[one].above
        return False


def _sense(line: str) -> Sense:
    head, _, gloss = line.partition("|")
    fields = head.split()
    count = int(fields[3], 16)
    names = tuple(fields[4 + 2 * number].replace("_", " ") for number in range(count))
    pointers = fields[5 + 2 * count :]
    above = [(kind, f"n{place}") for kind, place in zip(pointers[::4], pointers[1::4], strict=False) if kind[0] == "@"]
    explained = gloss.strip().split('; "')[0].strip()
    return Sense(f"n{fields[0]}", names, explained, tuple(place for _, place in above), ("@i" in dict(above)))
