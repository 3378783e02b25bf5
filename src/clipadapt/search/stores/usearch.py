"""The usearch store: a graph (HNSW) over float16 vectors in one mapped file; approximate, and fast among millions.

usearch and faiss crash each other when both are loaded, so this store refuses to open in a process that has faiss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.search.stores import exact
from clipadapt.search.stores import folder as kept
from clipadapt.search.stores.rows import answer, as_ids, as_queries, as_rows, no_facts, nulls

if TYPE_CHECKING:
    import pyarrow

    from clipadapt.embeddings import Embeddings
    from clipadapt.search.where import Where

CONNECTIVITY = 16  # neighbours of a node; usearch's default, as the next
EXPANSION_ADD = 128  # rows looked at when one is put in
EXPANSION_SEARCH = 128  # and in a search; twice usearch's default, for the recall


class UsearchStore:
    """A file of vectors and their graph, which is mapped until something is added or deleted.

    Whether k rows are found does not depend on the graph: where a walk finds fewer than there are, all rows that count
    are compared. So are they where a condition leaves so few that this is cheaper than a walk.
    """

    def __init__(self, folder: Path | str, dim: int, embeddings: Embeddings | None = None) -> None:
        if "faiss" in sys.modules:
            raise ClipadaptError("usearch and faiss cannot be in one process; do not import faiss before this store.")
        self.folder = Path(folder)
        self.dim = dim
        self.embeddings = embeddings
        self._mapped: Path | None = None  # the file, while the index is a view of it
        self._facts: pyarrow.Table | None = None
        self._fact_ids = np.empty(0, np.int64)  # (n,), of the rows of `_facts`
        self._index = self._new_index()
        self._changed = True  # and not on the disk yet
        self._open()

    def add(self, ids: np.ndarray, vectors: np.ndarray, facts: pyarrow.Table | None = None) -> None:
        schema = None if self._facts is None else self._facts.schema
        ids, vectors, facts = as_rows(ids, vectors, facts, self.dim, schema)
        if facts is not None and self._facts is None:
            self._fact_ids = self._ids()
            self._facts = nulls(len(self._fact_ids), facts.schema)
        self.delete(ids)
        self._index.add(ids, vectors)
        if self._facts is not None:
            facts = nulls(len(ids), self._facts.schema) if facts is None else facts
            self._facts = exact.join_tables([self._facts, facts])
            self._fact_ids = np.concatenate([self._fact_ids, ids])

    def delete(self, ids: np.ndarray) -> None:
        ids = as_ids(ids)
        if self._mapped is not None:
            self._index = self._restore(self._mapped, view=False)
            self._mapped = None
        self._changed = True
        self._index.remove(ids)
        if self._facts is not None:
            left = np.flatnonzero(~np.isin(self._fact_ids, ids))
            if len(left) < len(self._fact_ids):
                self._facts, self._fact_ids = self._facts.take(left), self._fact_ids[left]

    def search(self, queries: np.ndarray, k: int, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        queries = as_queries(queries, k, self.dim)
        passing = None if where is None else self._passing(where)
        rows = self.count() if passing is None else len(passing)
        fetched = k if passing is None else math.ceil(1.5 * k * self.count() / max(rows, 1))
        if rows <= 2 * CONNECTIVITY * fetched:  # about as many rows as a walk that fetches `fetched` compares
            return self._compare(queries, k, passing)
        found = [self._among(match, passing, k) for match in self._walk(queries, fetched)]
        scores, ids = answer(found, k)
        lacking = [row for row, (_, some) in enumerate(found) if len(some) < min(k, rows)]
        if lacking:
            scores[lacking], ids[lacking] = self._compare(queries[lacking], k, passing)
        return scores, ids

    def count(self) -> int:
        return len(self._index)

    def persist(self) -> None:
        if not self._changed:
            return
        files = {"index.usearch": lambda path: self._index.save(str(path))}
        if self._facts is not None:
            files["facts.parquet"] = kept.save_table(self._facts)
            files["ids.npy"] = kept.save_array(self._fact_ids)
        kept.write(self.folder, "usearch", self.dim, None, files)
        self._open()

    def _open(self) -> None:
        state = kept.read(self.folder, "usearch", self.dim)
        if state is None:
            return
        self._changed = False
        paths = {name: self.folder / file for name, file in state["files"].items()}
        self._mapped = paths["index.usearch"]
        self._index = self._restore(self._mapped, view=True)
        if "facts.parquet" in paths:
            self._facts = kept.load_table(paths["facts.parquet"])
            self._fact_ids = kept.load_array(paths["ids.npy"])
            if self._facts.num_rows != len(self._fact_ids):
                raise ArtifactError(f"{self.folder} is damaged: its files differ in length; delete it and index again.")

    def _new_index(self) -> Any:
        from usearch.index import Index

        return Index(
            ndim=self.dim,
            metric="ip",
            dtype="f16",
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
            expansion_search=EXPANSION_SEARCH,
        )

    def _restore(self, path: Path, view: bool) -> Any:
        from usearch.index import Index

        expansions = {"expansion_add": EXPANSION_ADD, "expansion_search": EXPANSION_SEARCH}
        try:
            return Index.restore(str(path), view=view, **expansions)
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); delete {self.folder} and index again.") from None

    def _ids(self) -> np.ndarray:
        """All ids (n,), ascending."""
        return np.sort(np.asarray(self._index.keys).astype(np.int64))

    def _passing(self, where: Where) -> np.ndarray:
        """The ids (m,), ascending, of the rows that fulfil a condition."""
        if self._facts is not None:
            return np.sort(self._fact_ids[where.mask(self._facts)])
        if self.embeddings is None:
            raise no_facts()
        ids = np.flatnonzero(where.mask(self.embeddings.table))
        return ids[self._index.contains(ids)] if len(ids) else ids

    def _walk(self, queries: np.ndarray, count: int) -> list[Any]:
        if len(queries) == 0:
            return []
        matches = self._index.search(queries, count)
        return list(matches) if len(queries) > 1 else [matches]

    def _among(self, match: Any, passing: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids of at most k matches that pass."""
        ids, scores = match.keys.astype(np.int64), 1 - match.distances
        if passing is not None:
            passes = passing[np.minimum(passing.searchsorted(ids), len(passing) - 1)] == ids
            ids, scores = ids[passes], scores[passes]
        return scores[:k], ids[:k]

    def _compare(self, queries: np.ndarray, k: int, passing: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The nearest of these ids, by comparing all of them."""
        scores, ids = exact.nearest(torch.from_numpy(queries), self._blocks(passing), k)
        return scores.numpy(), ids.numpy()

    def _blocks(self, passing: np.ndarray | None) -> Iterator[tuple[Tensor, Tensor]]:
        ids = self._ids() if passing is None else passing
        step = exact.block_rows(self.dim)
        for first in range(0, len(ids), step):
            block = ids[first : first + step]
            yield torch.from_numpy(block), torch.from_numpy(np.stack(self._index.get(block)))
