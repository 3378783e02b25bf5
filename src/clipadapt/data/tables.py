"""Data sets from tables: a CSV file of paths and labels, or a Parquet file that may hold the pictures themselves."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipadapt.data.dataset import Dataset
from clipadapt.data.items import BytesItem, FileItem, Item
from clipadapt.data.lists import image_list
from clipadapt.errors import DataError


def image_table(
    file: str | os.PathLike[str], image: str = "image", label: str = "label", domain: str | None = None
) -> Dataset:
    """The pictures that a table lists, one a row.

    Args:
        file: a .csv file (UTF-8, commas, first row = column names), .tsv (tabs) or .parquet.
        image: column of paths, taken relative to the table's folder; in Parquet also of encoded pictures (binary, or
            the {bytes, path} form that Hugging Face writes), which are then held in memory.
        label: column of class names or numbers. Classes are sorted by name (numbers by value); a Parquet file written
            by `datasets` brings its own class names.
        domain: column of domain names, if there is one.

    Raises:
        DataError: the file or a column is missing, a column occurs twice, or a row is incomplete or names a file
            that does not exist. Rows are counted as a spreadsheet shows them: in CSV the header is row 1;
            in Parquet the first picture is.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path} does not exist; a .csv, .tsv or .parquet file is needed.")
    columns = [image, label] if domain is None else [image, label, domain]
    class_names = None
    if path.suffix.lower() in (".csv", ".tsv"):
        first_row = 2
        rows = _read_csv(path, columns)
    elif path.suffix.lower() in (".parquet", ".pq"):
        first_row = 1
        rows, class_names = _read_parquet(path, columns, label)
    else:
        raise DataError(f"{path} is not a table that can be read; .csv, .tsv or .parquet is needed.")
    if not rows:
        raise DataError(f"{path} has no rows below its column names.")

    items = []
    for number, row in enumerate(rows, start=first_row):
        for column, value in zip(columns, row, strict=True):
            if value is None or value == "" or value != value:  # NaN is what Parquet's floats say for "nothing"
                raise DataError(f"{path} row {number}: the column {column!r} is empty.")
        items.append(_item(path, number, row[0]))
    domains = None if domain is None else [str(row[2]) for row in rows]
    return image_list(items, [row[1] for row in rows], class_names, domains=domains, name=path.stem)


def _item(table: Path, row: int, cell: Any) -> Item:
    if isinstance(cell, dict):  # the {bytes, path} form
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return BytesItem(f"{table} row {row}", cell)
    if not isinstance(cell, str):
        raise DataError(f"{table} row {row}: a path or an encoded picture is needed, not {type(cell).__name__}.")
    path = table.parent / cell
    if not path.is_file():
        raise DataError(f"{table} row {row}: {path} does not exist; paths are relative to the table's folder.")
    return FileItem(str(path))


def _read_csv(path: Path, columns: Sequence[str]) -> list[list[Any]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = [name.strip() for name in next(reader, [])]
            places = _places(path, columns, header)
            rows = []
            for number, row in enumerate(reader, start=2):
                if len(row) != len(header):
                    raise DataError(f"{path} row {number} has {len(row)} cells where {len(header)} are expected.")
                rows.append([row[place].strip() for place in places])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as UTF-8 CSV: {error}.") from None
    return rows


def _read_parquet(path: Path, columns: Sequence[str], label: str) -> tuple[list[list[Any]], list[str] | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError('Parquet files are read by an extra: pip install "clipadapt[tables]".') from None
    try:
        schema = pyarrow.parquet.read_schema(path)
        _places(path, columns, schema.names)
        table = pyarrow.parquet.read_table(path, columns=list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from None
    rows = [list(row) for row in zip(*(table[column].to_pylist() for column in columns), strict=True)]
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})  # written by `datasets`
    return rows, info.get("features", {}).get(label, {}).get("names")


def _places(path: Path, columns: Sequence[str], header: Sequence[str]) -> list[int]:
    for column in columns:
        if column not in header:
            raise DataError(f"{path} has no column {column!r}; its columns are: {', '.join(header) or 'none'}.")
        if header.count(column) > 1:
            raise DataError(f"{path} has {header.count(column)} columns named {column!r}; one is needed.")
    return [header.index(column) for column in columns]
