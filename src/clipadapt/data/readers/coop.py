"""The published train/val/test splits of CoOp (arXiv 2109.01134), kept as `split_zhou_*.json` files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from clipadapt.data.examples import Dataset, Split
from clipadapt.data.items import FileItem
from clipadapt.errors import DataError


def coop_split(file: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Split:
    """The split in `file`: `{"train": [[path, label, class name], …], "val": …, "test": …}`.

    Args:
        file: a `split_zhou_*.json` file.
        root: the folder its paths are relative to, by default the file's own; looked at only when an image is read.

    Raises:
        DataError: the file is missing or not of this form, a label has two names or a name two labels.
    """
    file = Path(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(content, dict) or not {"train", "val", "test"} <= content.keys():
        raise DataError(f'{file} is not a split file; lists under "train", "val" and "test" are needed.')

    names: dict[int, str] = {}
    for part in ("train", "val", "test"):
        for row, entry in enumerate(content[part]):
            _, label, name = _check_entry(entry, f"{file}, {part}[{row}]")
            if names.setdefault(label, name) != name:
                raise DataError(f"{file}, {part}[{row}]: label {label} is {name!r} here and {names[label]!r} before.")
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{file}: the labels must be 0 to {len(names) - 1} without gaps.")
    class_names = [names[label] for label in range(len(names))]

    folder = os.fspath(root) if root is not None else str(file.parent)

    def dataset(part: str) -> Dataset:
        items = [FileItem(os.path.join(folder, path)) for path, _, _ in content[part]]
        return Dataset(list(items), [label for _, label, _ in content[part]], class_names, name=f"{file.stem} {part}")

    return Split(dataset("train"), dataset("val"), dataset("test"))


def _check_entry(entry: Any, where: str) -> tuple[str, int, str]:
    match entry:
        case [str() as path, int() as label, str() as name]:
            return path, label, name
    raise DataError(f"{where} is {entry!r}; [path, label, class name] is needed.")
