"""What a vector store is: five methods, behind which a search is exact or approximate, local or on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow

    from clipadapt.search.where import Where


class VectorStore(Protocol):
    """Unit vectors by int64 id, compared by their inner product, with facts that a search can be narrowed to."""

    def add(self, ids: np.ndarray, vectors: np.ndarray, facts: pyarrow.Table | None = None) -> None:
        """Keep vectors (n, D) under ids (n,) from 0 up, in place of what was there; `facts` has n rows.

        Facts have the same columns always; rows added without any are null in all of them.
        """

    def delete(self, ids: np.ndarray) -> None:
        """Remove these ids; unknown ones are ignored."""

    def search(self, queries: np.ndarray, k: int, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The nearest of each of the queries (Q, D): scores (Q, k) float32, best first, and ids (Q, k) int64.

        Only rows whose facts fulfil `where` count. Where fewer than k are found, the rest is -inf and -1. Equal scores
        are ordered by id; only the exact store and pgvector guarantee which of them is the last.
        """

    def count(self) -> int:
        """How many vectors there are."""

    def persist(self) -> None:
        """Put everything that was added or deleted on the disk; a store that does so at once has nothing left to do."""
