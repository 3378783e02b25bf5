"""The exact store: every vector is compared, in blocks, over the memory map of the embeddings or of its own file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipadapt.errors import ArtifactError
from clipadapt.features.retrieval import top
from clipadapt.search.stores import folder as kept
from clipadapt.search.stores.rows import as_ids, as_queries, as_rows, no_facts, nulls

if TYPE_CHECKING:
    import pyarrow

    from clipadapt.embeddings import Embeddings
    from clipadapt.search.where import Where

BLOCK_NUMBERS = 1 << 20  # 4 MB in float32; at 16 MB a search takes three times as long
BLOCK_QUERIES = 256
SMALL_ROWS = 4096  # added rows are kept separately while they are fewer than this


class ExactStore:
    """Vectors as float16, searched by their float32 products with the queries, without any index.

    Given embeddings, their rows are there from the start under ids 0, 1, …, and are read from the map; `folder` keeps
    only what was added and which rows were deleted. A search needs the memory of the map, one block and the answer.
    """

    def __init__(self, folder: Path | str, dim: int, embeddings: Embeddings | None = None) -> None:
        self.folder = Path(folder)
        self.dim = dim
        self.embeddings = embeddings
        self._given: list[_Segment] = []
        self._added: list[_Segment] = []
        self._changed = True  # and not on the disk yet
        if embeddings is not None:
            if embeddings.dim != dim:
                raise ArtifactError(f"{embeddings.folder} holds vectors of width {embeddings.dim}, not {dim}.")
            first = 0
            for part in embeddings.parts:
                ids = np.arange(first, first + len(part))
                self._given.append(_Segment(ids, _tensor(part), None, np.ones(len(part), bool)))
                first += len(part)
        self._open()

    def add(self, ids: np.ndarray, vectors: np.ndarray, facts: pyarrow.Table | None = None) -> None:
        known = None if facts is None else self._schema()
        ids, vectors, facts = as_rows(ids, vectors, facts, self.dim, known)
        self.delete(ids)
        rows = torch.from_numpy(vectors).half()
        last = self._added[-1] if self._added else None
        if last is not None and len(last.ids) + len(ids) <= SMALL_ROWS and (last.facts is None) == (facts is None):
            left = last.left()
            ids, rows = np.concatenate([left.ids, ids]), torch.cat([left.vectors, rows])
            facts = None if facts is None else join_tables([left.facts, facts])
            self._added = self._added[:-1]
        order = np.argsort(ids)
        facts = None if facts is None else facts.take(order)
        self._added = [*self._added, _Segment(ids[order], rows[order], facts, np.ones(len(ids), bool))]

    def delete(self, ids: np.ndarray) -> None:
        ids = as_ids(ids)
        self._changed = True
        for segment in (*self._given, *self._added):
            segment.drop(ids)

    def search(self, queries: np.ndarray, k: int, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        asked = torch.from_numpy(as_queries(queries, k, self.dim))
        segments = [*self._given, *self._added]
        wanted = [segment.kept for segment in segments]
        if where is not None:
            wanted = [mask & fulfilled for mask, fulfilled in zip(wanted, self._masks(where), strict=True)]
        found = [
            nearest(block, (rows for pair in zip(segments, wanted, strict=True) for rows in pair[0].blocks(pair[1])), k)
            for block in asked.split(BLOCK_QUERIES)
        ]
        scores, ids = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return scores, ids

    def count(self) -> int:
        return sum(int(segment.kept.sum()) for segment in (*self._given, *self._added))

    def persist(self) -> None:
        if not self._changed:
            return
        added = [segment.left() for segment in self._added]
        gone = np.concatenate([np.empty(0, np.int64), *(segment.ids[~segment.kept] for segment in self._given)])
        ids = np.concatenate([np.empty(0, np.int64), *(segment.ids for segment in added)])
        files = {"deleted.npy": kept.save_array(gone)}
        if len(ids):
            order = np.argsort(ids)
            place = np.argsort(order)  # of each row in the file

            def write_vectors(path: Path) -> None:
                matrix = np.lib.format.open_memmap(path, "w+", np.float16, (len(ids), self.dim))
                first = 0
                for segment in added:
                    matrix[place[first : first + len(segment.ids)]] = segment.vectors.numpy()
                    first += len(segment.ids)
                matrix.flush()

            files |= {"ids.npy": kept.save_array(ids[order]), "vectors.npy": write_vectors}
            if (schema := self._schema()) is not None:
                facts = join_tables([nulls(len(s.ids), schema) if s.facts is None else s.facts for s in added])
                files["facts.parquet"] = kept.save_table(facts.take(order))
        kept.write(self.folder, "exact", self.dim, self._of(), files)
        self._open()

    def _open(self) -> None:
        """Take what the folder holds in place of what is in memory."""
        state = kept.read(self.folder, "exact", self.dim)
        if state is None:
            return
        self._changed = False
        if state["of"] != self._of():
            raise ArtifactError(f"{self.folder} belongs to other embeddings; delete it and index again.")
        paths = {name: self.folder / file for name, file in state["files"].items()}
        gone = kept.load_array(paths["deleted.npy"])
        for segment in self._given:
            segment.drop(gone)
        self._added = []
        if "ids.npy" in paths:
            ids = kept.load_array(paths["ids.npy"])
            vectors = kept.load_array(paths["vectors.npy"], mapped=True)
            facts = kept.load_table(paths["facts.parquet"]) if "facts.parquet" in paths else None
            if vectors.shape != (len(ids), self.dim) or (facts is not None and facts.num_rows != len(ids)):
                raise ArtifactError(f"{self.folder} is damaged: its files differ in length; delete it and index again.")
            self._added = [_Segment(ids, _tensor(vectors), facts, np.ones(len(ids), bool))]

    def _of(self) -> list[object] | None:
        return None if self.embeddings is None else [len(self.embeddings), self.embeddings.image_fingerprint]

    def _schema(self) -> pyarrow.Schema | None:
        """Of the facts: those of the embeddings, or those that were added first."""
        if self.embeddings is not None:
            return self.embeddings.table.schema
        return next((segment.facts.schema for segment in self._added if segment.facts is not None), None)

    def _masks(self, where: Where) -> Iterator[np.ndarray]:
        """Which rows of each segment fulfil a condition."""
        if (schema := self._schema()) is None:
            raise no_facts()
        if self.embeddings is not None:
            ends = np.cumsum([len(segment.ids) for segment in self._given])[:-1]
            yield from np.split(where.mask(self.embeddings.table), ends)
        for segment in self._added:
            yield where.mask(nulls(len(segment.ids), schema) if segment.facts is None else segment.facts)


class _Segment(NamedTuple):
    """A stretch of adjacent rows."""

    ids: np.ndarray  # (n,) int64, ascending
    vectors: Tensor  # (n, D) float16
    facts: pyarrow.Table | None  # n rows
    kept: np.ndarray  # (n,) bool: neither deleted nor replaced

    def drop(self, ids: np.ndarray) -> None:
        if len(self.ids):
            places = np.minimum(self.ids.searchsorted(ids), len(self.ids) - 1)
            self.kept[places[self.ids[places] == ids]] = False

    def left(self) -> _Segment:
        """Without what was dropped."""
        if self.kept.all():
            return self
        rows = np.flatnonzero(self.kept)
        facts = None if self.facts is None else self.facts.take(rows)
        return _Segment(self.ids[rows], self.vectors[rows], facts, np.ones(len(rows), bool))

    def blocks(self, wanted: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """The wanted rows (n,) bool as ids (b,) and vectors (b, D), in the order of the ids; whole blocks uncopied."""
        step = block_rows(self.vectors.shape[1])
        for first in range(0, len(self.ids), step):
            rows = slice(first, first + step)
            here = wanted[rows]
            if here.all():
                yield torch.from_numpy(self.ids[rows]), self.vectors[rows]
            elif here.any():
                yield torch.from_numpy(self.ids[rows][here]), self.vectors[rows][torch.from_numpy(here)]


def nearest(queries: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k rows with the largest product with each query: scores (Q, k) and ids (Q, k), filled up by -inf and -1.

    Best first, equal scores by the lower id.

    Args:
        queries: (Q, D) float32.
        blocks: ids (b,), ascending in each block, and vectors (b, D) float16, b from 1 to `block_rows(D)`.
    """
    scores = queries.new_full((len(queries), k), -torch.inf)
    ids = torch.full((len(queries), k), -1)
    # Kept, as a fresh piece of memory of this size costs more than what is done with it.
    rows = block_rows(queries.shape[1])
    wide = queries.new_empty(rows, queries.shape[1])
    products = queries.new_empty(len(queries) * rows)
    for numbers, vectors in blocks:
        block = wide[: len(vectors)].copy_(vectors)
        out = products[: len(queries) * len(block)].view(len(queries), len(block))
        torch.mm(queries, block.T, out=out)
        better = (out.amax(dim=1) >= scores[:, -1]).nonzero()[:, 0]  # queries to which this block matters
        if len(better) == 0:
            continue
        new, columns = top(out[better], k)
        new, found = torch.cat([scores[better], new], dim=1), torch.cat([ids[better], numbers[columns]], dim=1)
        order = found.argsort(dim=1)  # so that the stable order by scores keeps the lower id of equals
        new, best = new.gather(1, order).sort(dim=1, descending=True, stable=True)
        scores[better], ids[better] = new[:, :k], found.gather(1, order).gather(1, best)[:, :k]
    return scores, ids


def block_rows(dim: int) -> int:
    """Rows of a block: in float32, one that the processor's cache holds."""
    return max(BLOCK_NUMBERS // dim, 1)


def _tensor(mapped: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # that it cannot be written to; nobody does
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(mapped)


def join_tables(tables: list[pyarrow.Table]) -> pyarrow.Table:
    """Facts below each other; a column of nulls takes the type of the others."""
    import pyarrow

    return pyarrow.concat_tables(tables, promote_options="permissive")
