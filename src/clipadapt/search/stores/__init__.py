"""Vector stores behind one protocol."""

from clipadapt.search.stores.registry import STORES, open_store

__all__ = ["STORES", "open_store"]
