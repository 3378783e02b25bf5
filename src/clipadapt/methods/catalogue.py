"""The cards of all methods, read from their files without importing them.

A method is found by its key: its file has its name, in the folder of its family. The card is the decorator of its class
and the names of the class's bases, both of which are literal, so a parser reads them in a fraction of the time that
torch takes to import. A test compares every card read so with that of the imported class.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

from clipadapt.errors import ClipadaptError
from clipadapt.methods.card import Card, card_of

ROOT = Path(__file__).parent
NOT_FAMILIES = ("tasks", "kinds", "__pycache__")

_CLASS = re.compile(r"^(@method\(.*?^)class (\w+)\(([\w\s,.]*)\):", re.M | re.S)
_IMPORT = re.compile(r"^from clipadapt\.methods\.(\w+)\.(\w+) import (?:\(([^)]*)\)|([^\n(]*))", re.M)


def module_of(key: str) -> str | None:
    """The dotted module of the method called `key`, or None."""
    file = _files().get(stem_of(key))
    return None if file is None else f"clipadapt.methods.{file.parent.name}.{file.stem}"


def stem_of(key: str) -> str:
    """The name of the file of a method, without its ending."""
    return key.replace("++", "_plus_plus").replace("-", "_")


@cache
def cards() -> dict[str, Card]:
    """The card of every method whose file is in a family folder, by key, sorted."""
    found = {}
    for file in _files().values():
        facts = _facts(file)
        if facts is not None:
            key, given, _ = facts
            if stem_of(key) != file.stem:
                raise ClipadaptError(f"{file}: the method is called {key!r}, so its file must be {stem_of(key)}.py.")
            try:
                found[key] = card_of(key, file.parent.name, _bases(file), given)
            except TypeError as error:
                raise ClipadaptError(f"{file}: the card of {key!r} is wrong: {error}.") from None
    return dict(sorted(found.items()))


@cache
def _files() -> dict[str, Path]:
    families = [folder for folder in ROOT.iterdir() if folder.is_dir() and folder.name not in NOT_FAMILIES]
    files = (file for folder in sorted(families) for file in sorted(folder.glob("[a-z]*.py")))
    return {file.stem: file for file in files}


@cache
def _facts(file: Path) -> tuple[str, dict[str, Any], list[str]] | None:
    """Key, decorator's facts and names of the direct bases of the method in a file; None where there is none."""
    found = _CLASS.search(file.read_text(encoding="utf-8"))
    if found is None:
        return None
    try:
        call: Any = ast.parse(found[1].strip().removeprefix("@"), mode="eval").body
        key, facts = ast.literal_eval(call.args[0]), {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, IndexError) as error:
        raise ClipadaptError(f"{file}: @method takes a key and facts as literals: {error}.") from None
    return key, facts, [name.strip() for name in found[3].split(",") if name.strip()]


def _bases(file: Path) -> list[str]:
    """The names of all base classes of the method in a file, those of other methods' files included, nearest first."""
    facts = _facts(file)
    assert facts is not None
    text, names = file.read_text(encoding="utf-8"), []
    homes = {
        name.strip(): ROOT / folder / f"{module}.py"
        for folder, module, several, single in _IMPORT.findall(text)
        for name in (several or single).split(",")
    }
    for base in facts[2]:
        names.append(base)
        if base in homes and homes[base].is_file() and homes[base].parent.name not in NOT_FAMILIES:
            names += _bases(homes[base])
    return names
