"""Finding images: by words, by images, by both, among millions; duplicates and groups.

index = Index.open("embedded")
hits = index.search(query_vector(index.model, ["a red mug"])[None], k=20, where="year > 2020")[0]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Imported on first use: a store or a condition needs no model.
_HOMES = {
    "Hit": "clipadapt.search.index",
    "Index": "clipadapt.search.index",
    "Where": "clipadapt.search.where",
    "build_index": "clipadapt.search.index",
    "find_clusters": "clipadapt.search.clusters",
    "name_clusters": "clipadapt.search.clusters",
    "near_duplicates": "clipadapt.search.duplicates",
    "open_store": "clipadapt.search.stores.registry",
    "query_vector": "clipadapt.search.query",
    "read_words": "clipadapt.search.clusters",
    "write_sheet": "clipadapt.search.sheet",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from clipadapt.search.clusters import find_clusters as find_clusters
    from clipadapt.search.clusters import name_clusters as name_clusters
    from clipadapt.search.clusters import read_words as read_words
    from clipadapt.search.duplicates import near_duplicates as near_duplicates
    from clipadapt.search.index import Hit as Hit
    from clipadapt.search.index import Index as Index
    from clipadapt.search.index import build_index as build_index
    from clipadapt.search.query import query_vector as query_vector
    from clipadapt.search.sheet import write_sheet as write_sheet
    from clipadapt.search.stores.registry import open_store as open_store
    from clipadapt.search.where import Where as Where


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipadapt.search' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
