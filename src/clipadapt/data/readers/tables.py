"""Data sets from tables: a CSV file of paths and labels, or a Parquet file that may hold the images themselves."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from clipadapt.data.examples import Dataset
from clipadapt.data.items import BytesItem, FileItem, Item
from clipadapt.data.multilabel import MultiLabelDataset
from clipadapt.data.readers.lists import image_list
from clipadapt.errors import DataError

# The columns to read, in that order, of a table with these column names.
_Choice = Callable[[Sequence[str]], list[str]]


@overload
def image_table(
    file: str | os.PathLike[str],
    image: str = ...,
    label: str = ...,
    domain: str | None = ...,
    *,
    multi_label: Literal[False] = ...,
) -> Dataset: ...


@overload
def image_table(
    file: str | os.PathLike[str],
    image: str = ...,
    label: str = ...,
    domain: str | None = ...,
    *,
    multi_label: Literal[True],
    separator: str = ...,
) -> MultiLabelDataset: ...


def image_table(
    file: str | os.PathLike[str],
    image: str = "image",
    label: str = "label",
    domain: str | None = None,
    *,
    multi_label: bool = False,
    separator: str = ";",
) -> Dataset | MultiLabelDataset:
    """The images that a table lists, one per row.

    Args:
        file: a .csv file (UTF-8, commas, first row = column names), .tsv (tabs) or .parquet; or a folder that holds
            one of labels.csv, labels.tsv and labels.parquet.
        image: column of paths, taken relative to the table's folder; in Parquet also of encoded images (binary, or
            the {bytes, path} form that Hugging Face writes), which are then held in memory.
        label: column of class names or numbers. Classes are sorted by name (numbers by value); a Parquet file written
            by `datasets` brings its own class names.
        domain: column of domain names, if there is one.
        multi_label: an image has any number of labels, and the result is a `MultiLabelDataset`. The label column then
            holds names with a separator between them, in Parquet also lists of names or numbers; an empty cell is an
            image without labels. If there is no label column, every other column is a class, in that order, and
            holds 0 or 1.
        separator: what separates the names in a cell; blanks around them are ignored.

    Raises:
        DataError: the file or a column is missing, a column occurs twice, or a row is incomplete or names a file
            that does not exist. Rows are counted as a spreadsheet shows them: in CSV the header is row 1;
            in Parquet the first image is.
    """
    if not separator:
        raise DataError("The separator between labels is empty; give one such as ';'.")
    path = Path(file)
    name = path.stem
    if path.is_dir():
        path, name = _table_in(path), path.resolve().name
    if not path.is_file():
        raise DataError(f"{path} does not exist; a .csv, .tsv or .parquet file is needed.")
    before = [image] if domain is None else [image, domain]

    def choose(header: Sequence[str]) -> list[str]:
        one_hot = multi_label and label not in header
        classes = [column for column in header if column not in before] if one_hot else []
        return before + (classes or [label])

    class_names = None
    if path.suffix.lower() in (".csv", ".tsv"):
        first_row = 2
        columns, rows = _read_csv(path, choose)
    elif path.suffix.lower() in (".parquet", ".pq"):
        first_row = 1
        columns, rows, class_names = _read_parquet(path, choose, label)
    else:
        raise DataError(f"{path} is not a table that can be read; .csv, .tsv or .parquet is needed.")
    if not rows:
        raise DataError(f"{path} has no rows below its column names.")

    items = []
    numbered = list(enumerate(rows, start=first_row))
    for number, row in numbered:
        for column, value in zip(columns, row, strict=True):
            if _empty(value) and not (multi_label and column == label):
                raise DataError(f"{path} row {number}: the column {column!r} is empty.")
        items.append(_item(path, number, row[0]))
    domains = None if domain is None else [str(row[1]) for row in rows]
    if not multi_label:
        return image_list(items, [row[-1] for row in rows], class_names, domains=domains, name=name)
    if columns[-1] == label:
        named = [_names(path, number, label, row[-1], separator, class_names) for number, row in numbered]
        labels, class_names = _label_sets(path, label, named, class_names)
    else:
        class_names = columns[len(before) :]
        labels = [_marked_classes(path, number, label, class_names, row[len(before) :]) for number, row in numbered]
    return MultiLabelDataset(items, labels, class_names, domains, name)


def _table_in(folder: Path) -> Path:
    names = [f"labels{suffix}" for suffix in (".csv", ".tsv", ".parquet")]
    found = [name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        held = " and ".join(found) or "no table"
        raise DataError(f"The folder {folder} holds {held}; one of {', '.join(names)} is needed.")
    return folder / found[0]


def _empty(value: Any) -> bool:
    return value is None or value == "" or value != value  # NaN is what Parquet's floats say for "nothing"


def _names(
    table: Path, row: int, column: str, cell: Any, separator: str, class_names: list[str] | None
) -> list[str | int]:
    """The class names or numbers in one cell of the label column; indices, if the table brings its class names."""
    if _empty(cell):
        return []
    names = [name.strip() for name in cell.split(separator)] if isinstance(cell, str) else cell
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str | int) or (class_names is not None and name not in range(len(class_names))):
            needed = "class names" if class_names is None else f"indices into its {len(class_names)} class names"
            raise DataError(f"{table} row {row}: the column {column!r} holds {name!r}; {needed} are needed.")
    return [name for name in names if name != ""]


def _label_sets(
    table: Path, column: str, named: list[list[str | int]], class_names: list[str] | None
) -> tuple[list[frozenset[int]], list[str]]:
    """The cells' labels as indices, and what they point into: `class_names`, or else the names that occur, sorted."""
    if class_names is not None:
        return [frozenset(map(int, names)) for names in named], class_names
    found = sorted({str(name) for names in named for name in names})
    if not found:
        raise DataError(f"{table}: no row has a label in the column {column!r}.")
    if all(name.isdecimal() for name in found):
        found.sort(key=int)
    label_of = {name: index for index, name in enumerate(found)}
    return [frozenset(label_of[str(name)] for name in names) for names in named], found


def _marked_classes(
    table: Path, row: int, label: str, class_names: Sequence[str], cells: Sequence[Any]
) -> frozenset[int]:
    """The classes whose cell is 1 in one row of a table with a column per class."""
    for name, cell in zip(class_names, cells, strict=True):
        if cell not in (0, 1, "0", "1"):
            raise DataError(
                f"{table} row {row}: the column {name!r} holds {cell!r}; "
                f"as there is no column {label!r}, every other column is a class and holds 0 or 1."
            )
    return frozenset(index for index, cell in enumerate(cells) if int(cell))


def _item(table: Path, row: int, cell: Any) -> Item:
    if isinstance(cell, dict):  # the {bytes, path} form
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return BytesItem(f"{table} row {row}", cell)
    if not isinstance(cell, str):
        raise DataError(f"{table} row {row}: a path or an encoded image is needed, not {type(cell).__name__}.")
    path = table.parent / cell
    if not path.is_file():
        raise DataError(f"{table} row {row}: {path} does not exist; paths are relative to the table's folder.")
    return FileItem(str(path))


def _read_csv(path: Path, choose: _Choice) -> tuple[list[str], list[list[Any]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = [name.strip() for name in next(reader, [])]
            columns = choose(header)
            places = _places(path, columns, header)
            rows = []
            for number, row in enumerate(reader, start=2):
                if len(row) != len(header):
                    raise DataError(f"{path} row {number} has {len(row)} cells where {len(header)} are expected.")
                rows.append([row[place].strip() for place in places])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as UTF-8 CSV: {error}.") from None
    return columns, rows


def _read_parquet(path: Path, choose: _Choice, label: str) -> tuple[list[str], list[list[Any]], list[str] | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError('Parquet files are read by an extra: pip install "clipadapt[tables]".') from None
    try:
        schema = pyarrow.parquet.read_schema(path)
        columns = choose(schema.names)
        _places(path, columns, schema.names)
        table = pyarrow.parquet.read_table(path, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from None
    rows = [list(row) for row in zip(*(table[column].to_pylist() for column in columns), strict=True)]
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})  # written by `datasets`
    feature = info.get("features", {}).get(label, {})
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):  # a list of labels
        feature = feature["feature"]
    return columns, rows, feature.get("names") if isinstance(feature, dict) else None


def _places(path: Path, columns: Sequence[str], header: Sequence[str]) -> list[int]:
    for column in columns:
        if column not in header:
            raise DataError(f"{path} has no column {column!r}; its columns are: {', '.join(header) or 'none'}.")
        if header.count(column) > 1:
            raise DataError(f"{path} has {header.count(column)} columns named {column!r}; one is needed.")
    return [header.index(column) for column in columns]
