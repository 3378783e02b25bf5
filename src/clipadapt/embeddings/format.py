"""Embeddings of many images: a folder of parts, in a format that any program can read.

    part-00002-of-00010.npy      (n, D) float16, rows of unit norm, C order: `numpy.load(file, mmap_mode="r")`
    part-00002-of-00010.parquet  n rows: `name`, `digest` (of the content), then other facts about the images
    part-00002-of-00010.json     written last: marks the part as done and says what it was made from

The parts in the order of their numbers are the whole; they are never joined, so that a part can be written, checked,
copied or made again on its own, on any machine. `encode_shard` writes one part, `Embeddings` reads them all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipadapt.data import as_items
from clipadapt.embeddings import remote
from clipadapt.embeddings.facts import OWN, NotedItem, join_tables, table_of
from clipadapt.embeddings.listing import Given, Listing, arrow, hash_lines
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.features.encode import encode_images
from clipadapt.features.store import cache_root, checksum
from clipadapt.files import written_aside

if TYPE_CHECKING:
    import pyarrow

    from clipadapt.backbones import Backbone

FORMAT = 1  # raised when an older version of the library could not read the folder any more

# What the parts of a folder have in common, and what to say where one has not.
_COMMON = {
    "image_fingerprint": "by another model",
    "pictures": "of another list of images",
    "shards": "in another number of shards",
    "fast_decode": "with the other choice of fast_decode",
}


def encode_shard(
    backbone: Backbone,
    images: Any,
    out: Path | str,
    shard: tuple[int, int] = (0, 1),
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    model: str | None = None,
    fast_decode: bool = False,
    **options: Any,
) -> Path | str:
    """Write the i-th of n stretches of `images` into the folder `out`; any launcher may run the n calls anywhere.

    Calling again for a part that is done changes nothing and takes no time, and one that was interrupted continues
    where it was. `width`, `height`, `taken` (EXIF) and its `year` are noted of each image, null if it does not
    tell.

    Args:
        backbone: encodes the images: a `Backbone`, or the `encoder` of an adapted model.
        images: all images, the same in every call: what `as_items` or `list_images` gives.
        out: folder that the n calls share, or its URL; parts for a URL are made on this machine and then copied.
        shard: (i, n) with 0 <= i < n.
        columns: what else is known of each image of `images`, by name; kept in the Parquet file.
        model: the folder of the adapted model that the tower belongs to, to be remembered.
        fast_decode: see `encode_images`.
        options: `batch_size`, `workers`, `progress` and `on_error` of `encode_images`.

    Returns:
        The part's `.json` file.

    Raises:
        ClipadaptError: the numbers of the shard or the lengths of the columns are wrong, pyarrow is missing, or the
            disk is full.
        ArtifactError: `out` has this part already, of other images or by another tower.
    """
    arrow()
    index, count = shard
    if not 0 <= index < count:
        raise ClipadaptError(f"Shard {index} of {count} does not exist; shards are numbered from 0 to count - 1.")
    listing = _listing(images, columns or {})
    made_of = describe(backbone, listing, count, fast_decode)
    stem = f"part-{index:05d}-of-{count:05d}"
    marker = remote.join(str(out), f"{stem}.json")
    if (text := remote.read_text(marker)) is not None:
        check_same(_marker(text, marker), made_of, marker)
    elif remote.is_url(out):
        # A folder for what is made of the same: an interrupted upload resumes with the finished part.
        place = cache_root() / "embeddings" / hash_lines([str(out), json.dumps(made_of)])
        if not (place / f"{stem}.json").exists():
            _write_part(backbone, listing, place, index, made_of, model, options)
        files = [place / f"{stem}.{ending}" for ending in ("npy", "parquet", "json")]
        remote.upload(files, str(out))
        for file in reversed(files):
            file.unlink()
    else:
        _write_part(backbone, listing, Path(out), index, made_of, model, options)
    return marker if remote.is_url(out) else Path(marker)


def describe(backbone: Any, listing: Listing, shards: int, fast_decode: bool = False) -> dict[str, Any]:
    """What a part was made from, apart from its number: parts that agree in this belong together."""
    return {
        "format": FORMAT,
        "image_fingerprint": backbone.image_fingerprint,
        "pictures": listing.identity,
        "shards": shards,
        "fast_decode": fast_decode,
    }


def check_same(state: Mapping[str, Any], made_of: Mapping[str, Any], where: str) -> None:
    """Raise `ArtifactError` naming `where` if a part was made from something other than `made_of`."""
    for key, other in _COMMON.items():
        if state[key] != made_of[key]:
            raise ArtifactError(f"{where} was made {other}; use a new folder, or the same inputs as before.")


def parts_in(out: Path | str) -> dict[tuple[int, int], str]:
    """The markers of the parts that are done in a folder, by (number, count); paths, or URLs."""
    found = [(name, re.fullmatch(r"part-(\d+)-of-(\d+)\.json", name)) for name in remote.names_in(str(out))]
    return {(int(m[1]), int(m[2])): remote.join(str(out), name) for name, m in sorted(found) if m}


def read_marker(path: Path | str) -> dict[str, Any]:
    """What a part's `.json` says; raises `ArtifactError` if it is missing, damaged or of a newer version."""
    text = remote.read_text(str(path))
    if text is None:
        raise ArtifactError(f"{path} does not exist; embed that shard.")
    return _marker(text, str(path))


def _marker(text: str, path: str) -> dict[str, Any]:
    try:
        state = {"fast_decode": False} | json.loads(text)
        version = int(state["format"])
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path} is damaged; delete it and embed that shard again.") from None
    if version > FORMAT:
        raise ArtifactError(
            f"{path} has format {version}; this version reads formats up to {FORMAT}: upgrade clipadapt."
        )
    return state


def _listing(images: Any, columns: Mapping[str, Sequence[Any]]) -> Listing:
    if isinstance(images, Listing):
        return images
    items = as_items(images)
    for name, values in columns.items():
        if len(values) != len(items) or name in OWN:
            raise ClipadaptError(
                f"The column {name!r} must have one value per image, and not be called name or digest."
            )
    return Given(items, columns)


def _write_part(
    backbone: Any,
    listing: Listing,
    out: Path,
    index: int,
    made_of: dict[str, Any],
    model: str | None,
    options: dict[str, Any],
) -> None:
    pa, count = arrow(), made_of["shards"]
    stem = f"part-{index:05d}-of-{count:05d}"
    work = out / f".{stem}"  # what an interrupted run resumes from
    try:
        out.mkdir(parents=True, exist_ok=True)
        items, known = listing.stretch(listing.count * index // count, listing.count * (index + 1) // count, work)
        noted = [NotedItem(item) for item in items]
        encoded = encode_images(
            backbone, noted, cache=work, precision="float16", fast_decode=made_of["fast_decode"], **options
        )
        matrix = np.ascontiguousarray(encoded.features.numpy(), np.float16)  # (n, D), exact: rounded already
        kept = [noted[position] for position in encoded.kept]
        table = table_of(kept, encoded.digests, known.take(pa.array(encoded.kept, pa.int64())))
        state = made_of | {
            "backbone": {"source": backbone.source, "fingerprint": backbone.fingerprint},
            "model": model,
            "shard": index,
            "rows": len(matrix),
            "dim": backbone.dim,
            "checksum": checksum(matrix),
            "skipped": encoded.skipped,
        }
        # All three are on the disk before the first gets its name, and the marker, entered first, gets it last.
        with (
            written_aside(out / f"{stem}.json") as marker,
            written_aside(out / f"{stem}.parquet") as facts,
            written_aside(out / f"{stem}.npy") as features,
        ):
            with features.open("wb") as file:
                np.save(file, matrix)
            pa.parquet.write_table(table, facts)
            marker.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise ClipadaptError(
            f"{out / stem} cannot be written: {error.strerror or error}; what is done so far is kept, and the same "
            "command resumes from there."
        ) from None
    shutil.rmtree(work, ignore_errors=True)


class Embeddings:
    """All parts of a folder, mapped, not read.

    Attributes:
        folder: where they are on this machine.
        parts: matrices (n, D) float16, in order; together N rows.
        dim: D.
        backbone: {"source", "fingerprint"} of the backbone.
        model: the folder of the adapted model whose image tower it was, or None.
        image_fingerprint: of the image tower; queries must come from a model with the same.
        skipped: (name, reason) of the images that could not be read.
    """

    def __init__(self, folder: Path | str) -> None:
        """Open a folder; what is at a URL is copied to this machine first, once.

        Raises:
            ArtifactError: parts are missing (it names them), damaged, or do not belong together.
        """
        self.folder = _local_copy(str(folder)) if remote.is_url(folder) else Path(folder)
        states = [read_marker(path) for path in parts_in(self.folder).values()]
        if not states:
            raise ArtifactError(f"{folder} holds no finished embeddings; `clipadapt embed` makes them.")
        first = states[0]
        for key in _COMMON:
            if any(state[key] != first[key] for state in states):
                raise ArtifactError(f"The parts in {folder} differ in their {key}; use one folder per embedding.")
        missing = sorted(set(range(first["shards"])) - {state["shard"] for state in states})
        if missing:
            listed = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
            raise ArtifactError(f"{folder} is incomplete: part {listed} of {first['shards']} is not done yet.")
        self._states = states
        self.dim: int = first["dim"]
        self.backbone: dict[str, str] = first["backbone"]
        self.model: str | None = first["model"]
        self.image_fingerprint: str = first["image_fingerprint"]
        self.skipped: list[tuple[str, str]] = [(name, why) for state in states for name, why in state["skipped"]]
        self.parts = [self._map(state) for state in states]

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
        """The facts about the images, N rows in the order of the matrix."""
        pa = arrow()
        tables = [pa.parquet.read_table(self._path(state, "parquet")) for state in self._states]
        for state, table in zip(self._states, tables, strict=True):
            if table.num_rows != state["rows"]:
                raise ArtifactError(f"{self._path(state, 'parquet')} has {table.num_rows} rows, not {state['rows']}.")
        return join_tables(tables)

    @cached_property
    def names(self) -> list[str]:
        """The images' names: paths, where they are files."""
        return self.table["name"].to_pylist()

    def check(self) -> None:
        """Read everything once and compare it with what was written; raises `ArtifactError` naming a damaged part."""
        for state, part in zip(self._states, self.parts, strict=True):
            if checksum(np.ascontiguousarray(part)) != state["checksum"]:
                raise self._damage_error(state, "its checksum differs")

    def _map(self, state: dict[str, Any]) -> np.ndarray:
        try:
            part = np.load(self._path(state, "npy"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damage_error(state, str(error)) from None
        if part.shape != (state["rows"], state["dim"]) or part.dtype != np.float16:
            raise self._damage_error(state, f"it holds {part.shape} {part.dtype}")
        return part

    def _path(self, state: dict[str, Any], ending: str) -> Path:
        return self.folder / f"part-{state['shard']:05d}-of-{state['shards']:05d}.{ending}"

    def _damage_error(self, state: dict[str, Any], why: str) -> ArtifactError:
        path = self._path(state, "npy")
        return ArtifactError(f"{path} is missing or damaged ({why}); delete its .json and embed that shard again.")


def _local_copy(url: str) -> Path:
    """A local copy of the parts at a URL; parts that did not change since the last time are not copied again."""
    place, markers = cache_root() / "embeddings" / hash_lines([url]), parts_in(url)
    place.mkdir(parents=True, exist_ok=True)
    for key, path in parts_in(place).items():
        if key not in markers:
            Path(path).unlink()
    for (index, count), marker in markers.items():
        stem = f"part-{index:05d}-of-{count:05d}"
        text, copy = remote.read_text(marker), place / f"{stem}.json"
        if text is None or (copy.is_file() and copy.read_text(encoding="utf-8") == text):
            continue
        for ending in ("npy", "parquet"):
            with written_aside(place / f"{stem}.{ending}") as aside:
                remote.download(remote.join(url, f"{stem}.{ending}"), aside)
        with written_aside(copy) as aside:
            aside.write_text(text, encoding="utf-8")
    return place
