"""The vector stores by name, opened without importing the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clipadapt.errors import ClipadaptError, unknown_name

if TYPE_CHECKING:
    from clipadapt.embeddings import Embeddings
    from clipadapt.search.stores.store import VectorStore


def _exact(location: str, dim: int, embeddings: Embeddings | None) -> VectorStore:
    from clipadapt.search.stores.exact import ExactStore

    return ExactStore(location, dim, embeddings)


def _usearch(location: str, dim: int, embeddings: Embeddings | None) -> VectorStore:
    from clipadapt.search.stores.usearch import UsearchStore

    return UsearchStore(location, dim, embeddings)


def _lance(location: str, dim: int, _: Embeddings | None) -> VectorStore:
    from clipadapt.search.stores.lance import LanceStore

    return LanceStore(location, dim)


def _pgvector(location: str, dim: int, _: Embeddings | None) -> VectorStore:
    from clipadapt.search.stores.pgvector import PgvectorStore

    return PgvectorStore(location, dim)


def _qdrant(location: str, dim: int, _: Embeddings | None) -> VectorStore:
    from clipadapt.search.stores.qdrant import QdrantStore

    return QdrantStore(location, dim)


STORES: dict[str, Callable[[str, int, Embeddings | None], VectorStore]] = {
    "exact": _exact,
    "usearch": _usearch,
    "lance": _lance,
    "pgvector": _pgvector,
    "qdrant": _qdrant,
}
_EXTRAS = {"usearch": "ann", "lance": "lance", "pgvector": "pgvector", "qdrant": "qdrant"}


def open_store(kind: str, location: str | Path, dim: int, embeddings: Embeddings | None = None) -> VectorStore:
    """The store of a kind at a place, with what it holds already; a new one where there is none.

    Args:
        kind: one of `STORES`.
        location: a folder (exact, usearch, lance), an object store's URI (lance), or a server's URL (pgvector, qdrant),
            where `#name` at the end names the table or collection; `:memory:` (qdrant) keeps nothing.
        dim: D, the width of the vectors.
        embeddings: whose rows the ids number. The exact store searches them in place and keeps only what is
            added to them or deleted; usearch takes facts from their table, unless `add` brings others.

    Raises:
        ClipadaptError: the kind is unknown, its package is missing, or its server cannot be used.
        ArtifactError: what is there is damaged, of another width, or of other embeddings.
    """
    if kind not in STORES:
        raise unknown_name("store", kind, STORES)
    try:
        return STORES[kind](str(location), dim, embeddings)
    except ModuleNotFoundError as error:
        if kind not in _EXTRAS or (error.name or "").startswith("clipadapt"):
            raise
        raise ClipadaptError(f'The {kind} store needs an extra: pip install "clipadapt[{_EXTRAS[kind]}]".') from None
