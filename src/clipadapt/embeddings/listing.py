"""What a folder, a table, a list or tar shards hold: images in a fixed order, to be divided among shards.

A listing is cheap to make, is the same on every machine, and travels to other processes. What costs more, such as a
tar's table of contents or an image's header, is read by the shard that it belongs to.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import product
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from clipadapt.data import BytesItem, FileItem, Item, image_files
from clipadapt.data.readers.folders import IMAGE_SUFFIXES
from clipadapt.data.readers.shards import read_samples
from clipadapt.embeddings import remote
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.renamed import old_names

if TYPE_CHECKING:
    import pyarrow

PART_IMAGES = 100_000  # of a part, at most, unless something else is asked for
PART_BYTES = 1 << 30  # of images stored in a table's rows, which a shard holds in memory

_TABLES = (".csv", ".tsv", ".parquet", ".pq")
_FORMS = "a folder of images, a table (.csv, .tsv, .parquet), .tar shards, or a .txt list of paths and URLs"


@runtime_checkable
class Listing(Protocol):
    """Images to be divided among shards.

    count     how many things there are to divide: images, or tar files
    parts     into how many shards they are divided by default
    identity  32 hex digits: of the things' names, in their order
    """

    @property
    def count(self) -> int: ...

    @property
    def parts(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def stretch(self, start: int, stop: int, work: Path) -> tuple[list[Item], pyarrow.Table]:
        """The images in things `start` to `stop`, and a table of facts about them, one row per image.

        `work` is a folder for this shard alone, for what has to be copied first; it may not exist yet.
        """
        ...


def list_images(source: str | Path) -> Listing:
    """The images that `source` names.

    Args:
        source: a path, or a URL that fsspec opens, of one of:
            a folder: all images in it and below, sorted; column `folder`, where in it they are;
            a .csv, .tsv or .parquet table: column `image` with paths (relative to the table) or URLs, in Parquet also
            with encoded images; all other columns are kept;
            .tar shards in WebDataset's form, with * or {000..123} for several: the fields of each `.json`, and each
            `.txt` and `.cls`, become columns `txt` and `cls`;
            a .txt file with a path (relative to it) or URL a line.

    Raises:
        DataError: it does not exist, or holds no images.
    """
    source = str(source)
    suffix = PurePosixPath(source.split("?")[0]).suffix.lower()
    if not remote.is_url(source) and os.path.isdir(source):
        return _folder(source)
    if suffix == ".tar":
        return _tars(source)
    if not remote.is_url(source) and not os.path.exists(source):
        raise DataError(f"{source} does not exist; give {_FORMS}.")
    if suffix in _TABLES:
        return _table(source, suffix)
    if suffix == ".txt":
        return _text_list(source)
    if remote.is_url(source):
        return _folder(source)
    raise DataError(f"{source} cannot be embedded; give {_FORMS}.")


def arrow() -> Any:
    """pyarrow, with its csv and parquet parts."""
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise ClipadaptError('Embeddings need an extra: pip install "clipadapt[search]".') from None
    return pyarrow


def as_table(columns: Mapping[str, Sequence[Any]]) -> pyarrow.Table:
    """Columns of Python values; one whose values are of different kinds becomes text."""
    return arrow().table({name: _array(values) for name, values in columns.items()})


def hash_lines(lines: Iterable[str]) -> str:
    """32 hex digits of strings in their order."""
    digest = blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class Given:
    """Images in a list, with columns of facts about them."""

    items: Sequence[Item]
    columns: Mapping[str, Sequence[Any]]

    @property
    def count(self) -> int:
        return len(self.items)

    @property
    def parts(self) -> int:
        return _parts(self.count)

    @cached_property
    def identity(self) -> str:
        return hash_lines(item.name for item in self.items)

    def stretch(self, start: int, stop: int, work: Path) -> tuple[list[Item], pyarrow.Table]:
        columns = {name: values[start:stop] for name, values in self.columns.items()}
        return list(self.items[start:stop]), as_table(columns)


# -- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Images by their paths or URLs; below `root`, if they are those of a folder."""

    names: Sequence[str]
    root: str | None = None

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def parts(self) -> int:
        return _parts(self.count)

    @cached_property
    def identity(self) -> str:
        return hash_lines(self.names)

    def stretch(self, start: int, stop: int, work: Path) -> tuple[list[Item], pyarrow.Table]:
        names = self.names[start:stop]
        columns = {}
        if self.root is not None:
            columns["folder"] = [remote.parent(name)[len(self.root) :].strip("/\\") for name in names]
        return [_item(name) for name in names], as_table(columns)


def _item(name: str) -> Item:
    return remote.RemoteItem(name) if remote.is_url(name) else FileItem(name)


def _folder(source: str) -> Files:
    if remote.is_url(source):
        root, found = remote.files_below(source)
        names = [name for name in found if _is_image(name[len(root) :])]
    else:
        root, names = source.rstrip("/\\"), image_files(source)
    if not names:
        raise DataError(f"The folder {source} holds no images.")
    return Files(names, root)


def _is_image(path: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
    return not hidden and os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _text_list(source: str) -> Files:
    with remote.open_path(source) as file:
        try:
            lines = file.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{source} is not UTF-8 text: {error}.") from None
    names = [remote.join(remote.parent(source), line.strip()) for line in lines if line.strip()]
    if not names:
        raise DataError(f"{source} is empty; write one path or URL per line.")
    return Files(names)


# -- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a table with a column `image`; of a Parquet file they are read when they are wanted."""

    source: str
    count: int
    parts: int
    identity: str
    table: pyarrow.Table | None = None  # of a CSV file

    def stretch(self, start: int, stop: int, work: Path) -> tuple[list[Item], pyarrow.Table]:
        if self.table is not None:
            rows, first = self.table.slice(start, stop - start), 2  # as a spreadsheet counts them
        else:
            rows, first = self._read(start, stop), 1
        cells = rows["image"].to_pylist()
        items = [self._image(cell, first + start + number) for number, cell in enumerate(cells)]
        return items, rows.drop_columns("image")

    def _read(self, start: int, stop: int) -> pyarrow.Table:
        pa, found, first = arrow(), [], 0
        with remote.open_path(self.source) as file, _readable(self.source):
            parquet = pa.parquet.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                after = first + parquet.metadata.row_group(group).num_rows
                if first < stop and after > start:
                    rows = parquet.read_row_group(group)
                    found.append(rows.slice(max(start - first, 0), min(stop, after) - max(start, first)))
                first = after
            return pa.concat_tables(found) if found else parquet.schema_arrow.empty_table()

    def _image(self, cell: Any, row: int) -> Item:
        if isinstance(cell, dict):  # the {bytes, path} form that Hugging Face writes
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return BytesItem(f"{self.source} row {row}", cell)
        if not isinstance(cell, str) or not cell.strip():
            raise DataError(f"{self.source} row {row}: a path, a URL or an encoded image is needed in column 'image'.")
        return _item(remote.join(remote.parent(self.source), cell.strip()))


def _table(source: str, suffix: str) -> Rows:
    pa = arrow()
    with remote.open_path(source) as file, _readable(source):
        if suffix in (".csv", ".tsv"):
            options = pa.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
            text = pa.csv.ConvertOptions(column_types={"image": pa.string()})
            table = pa.csv.read_csv(file, parse_options=options, convert_options=text)
            _check_columns(source, table.schema)
            identity = hash_lines(table["image"].to_pylist())
            return Rows(source, table.num_rows, _parts(table.num_rows), identity, table)
        parquet = pa.parquet.ParquetFile(file)
        schema, meta = parquet.schema_arrow, parquet.metadata
        _check_columns(source, schema)
        kind = schema.field("image").type
        groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            batches = parquet.iter_batches(columns=["image"])
            identity = hash_lines(str(name) for batch in batches for name in batch.column(0).to_pylist())
            parts = _parts(meta.num_rows)
        else:
            identity = hash_lines(json.dumps(group.to_dict(), default=str, sort_keys=True) for group in groups)
            parts = max(_parts(meta.num_rows), -(-sum(group.total_byte_size for group in groups) // PART_BYTES))
        return Rows(source, meta.num_rows, parts, identity)


def _check_columns(source: str, schema: pyarrow.Schema) -> None:
    if schema.names.count("image") != 1:
        listed = ", ".join(schema.names) or "none"
        raise DataError(f"{source} needs one column 'image' with paths or URLs; its columns are: {listed}.")


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """What pyarrow says of a damaged table becomes a sentence that names it."""
    try:
        yield
    except (arrow().ArrowException, OSError) as error:
        reason = str(error).rstrip(".").splitlines()[0]
        raise DataError(f"{source} cannot be read as a table: {reason}.") from None


# -- tar shards ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tars:
    """WebDataset shards, each with the size that it was listed with; a part is made of whole ones."""

    shards: Sequence[tuple[str, int | None]]

    @property
    def count(self) -> int:
        return len(self.shards)

    @property
    def parts(self) -> int:
        return len(self.shards)

    @cached_property
    def identity(self) -> str:
        return hash_lines(f"{name} {size}" for name, size in self.shards)

    def stretch(self, start: int, stop: int, work: Path) -> tuple[list[Item], pyarrow.Table]:
        items: list[Item] = []
        facts: list[dict[str, Any]] = []
        for name, _ in self.shards[start:stop]:
            for sample in read_samples(_local(name, work), name):
                items.append(sample.image)
                facts.append(_facts(sample.texts, f"{name}, sample {sample.key!r}"))
        columns = dict.fromkeys(column for row in facts for column in row)
        return items, as_table({column: [row.get(column) for row in facts] for column in columns})


def _tars(source: str) -> Tars:
    shards: list[tuple[str, int | None]] = []
    for pattern in _expand_braces(source):
        if not remote.is_url(pattern):
            paths = sorted(glob.glob(pattern)) or [pattern]
            missing = next((path for path in paths if not os.path.isfile(path)), None)
            if missing is not None:
                raise DataError(f"{missing} matches no .tar file.")
            shards += [(path, os.path.getsize(path)) for path in paths]
        elif "*" in pattern or "?" in pattern:
            found = remote.matching(pattern)
            if not found:
                raise DataError(f"{pattern} matches no .tar file.")
            shards += found
        else:
            shards.append((pattern, None))
    return Tars(shards)


def _expand_braces(pattern: str) -> list[str]:
    """All names that braces expand to, as in WebDataset: a-{00..11}.tar is a-00.tar to a-11.tar."""
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)  # text, first, last, text, …
    ranges = [
        [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    texts = pieces[::3]
    return ["".join(a + b for a, b in zip(texts, [*numbers, ""], strict=True)) for numbers in product(*ranges)]


def _local(shard: str, work: Path) -> str:
    """The path of a shard; one behind a URL is read from end to end once, into the folder `work`."""
    if not remote.is_url(shard):
        return shard
    file = work / f"{hash_lines([shard])}.tar"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".tmp")
        remote.download(shard, aside)
        os.replace(aside, file)
    return str(file)


def _facts(texts: Mapping[str, bytes], where: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    try:
        if "json" in texts:
            fields = json.loads(texts["json"])
            facts |= fields if isinstance(fields, dict) else {"json": fields}
        facts |= {ending: texts[ending].decode().strip() for ending in ("cls", "txt") if ending in texts}
    except ValueError as error:
        raise DataError(f"{where}: its .json, .cls or .txt is not valid: {error}.") from None
    return facts


# -- values ----------------------------------------------------------------------------------------------------------


def _parts(images: int) -> int:
    return max(1, -(-images // PART_IMAGES))


def _array(values: Sequence[Any]) -> Any:
    pa = arrow()
    if not any(isinstance(value, dict | list) for value in values):
        with suppress(pa.ArrowException):
            return pa.array(values)
    return pa.array([_text(value) for value in values], pa.string())


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


__getattr__ = old_names(__name__)
