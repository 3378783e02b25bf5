"""Embeddings of many pictures: a folder of parts, in a format that any program can read.

    part-00002-of-00010.npy      (n, D) float16, rows of unit norm, C order: `numpy.load(file, mmap_mode="r")`
    part-00002-of-00010.parquet  n rows: `name`, `digest` (of the content), then whatever else is known of the pictures
    part-00002-of-00010.json     written last, it marks the part as done and says what it is of

The parts in the order of their numbers are the whole; they are never joined, so that a part can be written, checked,
copied or made again on its own, on any machine. `encode_shard` writes one part, `Embeddings` reads them all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipadapt.data import as_items
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.features.encode import encode_images
from clipadapt.features.store import checksum
from clipadapt.files import written_aside

if TYPE_CHECKING:
    import pyarrow

    from clipadapt.backbones import Backbone

FORMAT = 1  # raised when an older version of the library could not read the folder any more


def encode_shard(
    backbone: Backbone,
    images: Any,
    out: Path | str,
    shard: tuple[int, int] = (0, 1),
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    model: str | None = None,
    **options: Any,
) -> Path:
    """Write the i-th of n stretches of `images` into the folder `out`; any launcher may run the n calls anywhere.

    Calling again for a part that is done changes nothing and takes no time, and one that was interrupted continues
    where it was.

    Args:
        backbone: encodes the pictures: a `Backbone`, or `Method.image_tower()` of an adapted model.
        images: all pictures, the same list in every call.
        out: folder that the n calls share.
        shard: (i, n) with 0 <= i < n.
        columns: what else is known of each picture of `images`, by name; kept in the Parquet file.
        model: the folder of the adapted model that the tower belongs to, to be remembered.
        options: `batch_size`, `workers`, `progress` and `on_error` of `encode_images`.

    Returns:
        The part's `.json` file.

    Raises:
        ClipadaptError: the numbers of the shard or the lengths of the columns are wrong, or pyarrow is missing.
        ArtifactError: `out` has this part already, of other pictures or by another tower.
    """
    pyarrow, parquet = _pyarrow()
    index, count = shard
    if not 0 <= index < count:
        raise ClipadaptError(f"Shard {index} of {count} does not exist; shards are numbered from 0 to count - 1.")
    out = Path(out)
    items = as_items(images)
    rows = slice(len(items) * index // count, len(items) * (index + 1) // count)
    mine = items[rows]
    for name, values in (columns or {}).items():
        if len(values) != len(items) or name in ("name", "digest"):
            raise ClipadaptError(
                f"The column {name!r} must have one value a picture, and not be called name or digest."
            )
    made_of: dict[str, Any] = {
        "format": FORMAT,
        "image_fingerprint": backbone.image_fingerprint,
        "pictures": _hash_lines(item.name for item in items),
        "shards": count,
    }
    stem = f"part-{index:05d}-of-{count:05d}"
    marker, work = out / f"{stem}.json", out / f".{stem}"
    if marker.exists():
        if any(_read_marker(marker).get(key) != value for key, value in made_of.items()):
            raise ArtifactError(f"{marker} is of other pictures or by another model; use a new folder.")
        return marker
    out.mkdir(parents=True, exist_ok=True)

    encoded = encode_images(backbone, mine, cache=work, precision="float16", **options)
    matrix = np.ascontiguousarray(encoded.features.numpy(), np.float16)  # (n, D), exact: they were rounded already
    table = pyarrow.table(
        {"name": [mine[i].name for i in encoded.kept], "digest": encoded.digests}
        | {name: [values[rows][i] for i in encoded.kept] for name, values in (columns or {}).items()}
    )
    with written_aside(out / f"{stem}.npy") as aside, aside.open("wb") as file:
        np.save(file, matrix)
    with written_aside(out / f"{stem}.parquet") as aside:
        parquet.write_table(table, aside)
    state = made_of | {
        "backbone": {"source": backbone.source, "fingerprint": backbone.fingerprint},
        "model": model,
        "shard": index,
        "rows": len(matrix),
        "dim": backbone.dim,
        "checksum": checksum(matrix),
        "skipped": encoded.skipped,
    }
    with written_aside(marker) as aside:
        aside.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return marker


class Embeddings:
    """All parts of a folder, mapped, not read.

    Attributes:
        folder: where they are.
        parts: matrices (n, D) float16, in order; together N rows.
        dim: D.
        backbone: {"source", "fingerprint"} of the backbone.
        model: the folder of the adapted model whose image tower it was, or None.
        image_fingerprint: of the image tower; queries must come from a model with the same.
        skipped: (name, reason) of the pictures that could not be read.
    """

    def __init__(self, folder: Path | str) -> None:
        """Open a folder.

        Raises:
            ArtifactError: parts are missing (it names them), damaged, or do not belong together.
        """
        self.folder = Path(folder)
        states = sorted((_read_marker(path) for path in self.folder.glob("part-*.json")), key=lambda s: s["shard"])
        if not states:
            raise ArtifactError(f"{self.folder} holds no finished embeddings; `clipadapt embed` makes them.")
        first = states[0]
        for key in ("image_fingerprint", "pictures", "shards"):
            if any(state[key] != first[key] for state in states):
                raise ArtifactError(f"The parts in {self.folder} differ in their {key}; use one folder per embedding.")
        missing = sorted(set(range(first["shards"])) - {state["shard"] for state in states})
        if missing:
            listed = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
            raise ArtifactError(f"{self.folder} is incomplete: part {listed} of {first['shards']} is not done yet.")
        self._states = states
        self.dim: int = first["dim"]
        self.backbone: dict[str, str] = first["backbone"]
        self.model: str | None = first["model"]
        self.image_fingerprint: str = first["image_fingerprint"]
        self.skipped: list[tuple[str, str]] = [(name, why) for state in states for name, why in state["skipped"]]
        self.parts = [self._mapped(state) for state in states]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def blocks(self, rows: int = 1 << 16) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, at most `rows` rows (n, D) float16) from first to last; nothing is copied."""
        first = 0
        for part in self.parts:
            for start in range(0, len(part), rows):
                yield first + start, part[start : start + rows]
            first += len(part)

    def rows(self, numbers: Sequence[int]) -> np.ndarray:
        """Some rows (len(numbers), D), copied."""
        ends = np.cumsum([len(part) for part in self.parts])
        wanted = np.asarray(numbers, dtype=np.int64)
        which = np.searchsorted(ends, wanted, side="right")
        found = np.empty((len(wanted), self.dim), np.float16)
        for number in np.unique(which):
            here = which == number
            part = self.parts[number]
            found[here] = part[wanted[here] - (ends[number] - len(part))]
        return found

    @cached_property
    def table(self) -> pyarrow.Table:
        """What is known of the pictures, N rows in the order of the matrix."""
        pyarrow, parquet = _pyarrow()
        tables = [parquet.read_table(self._path(state, "parquet")) for state in self._states]
        for state, table in zip(self._states, tables, strict=True):
            if table.num_rows != state["rows"]:
                raise ArtifactError(f"{self._path(state, 'parquet')} has {table.num_rows} rows, not {state['rows']}.")
        return pyarrow.concat_tables(tables, promote_options="permissive")

    @cached_property
    def names(self) -> list[str]:
        """The pictures' names: paths, where they are files."""
        return self.table["name"].to_pylist()

    def check(self) -> None:
        """Read everything once and compare it with what was written; raises `ArtifactError` naming a damaged part."""
        for state, part in zip(self._states, self.parts, strict=True):
            if checksum(np.ascontiguousarray(part)) != state["checksum"]:
                raise self._damaged(state, "its checksum differs")

    def _mapped(self, state: dict[str, Any]) -> np.ndarray:
        try:
            part = np.load(self._path(state, "npy"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(state, str(error)) from None
        if part.shape != (state["rows"], state["dim"]) or part.dtype != np.float16:
            raise self._damaged(state, f"it holds {part.shape} {part.dtype}")
        return part

    def _path(self, state: dict[str, Any], ending: str) -> Path:
        return self.folder / f"part-{state['shard']:05d}-of-{state['shards']:05d}.{ending}"

    def _damaged(self, state: dict[str, Any], why: str) -> ArtifactError:
        path = self._path(state, "npy")
        return ArtifactError(f"{path} is missing or damaged ({why}); delete its .json and embed that shard again.")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ClipadaptError('Embeddings need an extra: pip install "clipadapt[search]".') from None
    return pyarrow, pyarrow.parquet


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version = int(state["format"])
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path} is damaged; delete it and embed that shard again.") from None
    if version > FORMAT:
        raise ArtifactError(
            f"{path} has format {version}; this version reads formats up to {FORMAT}: upgrade clipadapt."
        )
    return state


def _hash_lines(lines: Iterable[str]) -> str:
    digest = blake2b(digest_size=16)
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()
