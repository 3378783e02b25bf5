"""Labelled pictures from folders, tables, split files, hub data sets and shards; splits, templates, the playground."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipadapt.data.dataset import Dataset, Occurrence, Split, as_items, find_duplicates
from clipadapt.data.items import BytesItem, EncodedItem, FileItem, GeneratedItem, ImageItem, Item

if TYPE_CHECKING:
    from clipadapt.data.playground import Playground as Playground

__all__ = [
    "BytesItem",
    "Dataset",
    "EncodedItem",
    "FileItem",
    "GeneratedItem",
    "ImageItem",
    "Item",
    "Occurrence",
    "Playground",
    "Split",
    "as_items",
    "find_duplicates",
]


def __getattr__(name: str) -> Any:
    if name != "Playground":  # the only part that is heavy to import
        raise AttributeError(f"module 'clipadapt.data' has no attribute {name!r}")
    return import_module("clipadapt.data.playground").Playground
