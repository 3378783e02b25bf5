"""Labelled images from folders, tables, split files, hub data sets and shards; splits, templates, the playground."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipadapt.data.examples import Dataset, Examples, Occurrence, Split, Step, as_items, find_duplicates
from clipadapt.data.items import BytesItem, EncodedItem, FileItem, GeneratedItem, ImageItem, Item
from clipadapt.data.multilabel import MultiLabelDataset
from clipadapt.data.pairs import Pairs, image_pairs
from clipadapt.data.readers.coop import coop_split
from clipadapt.data.readers.folders import image_files, image_folder
from clipadapt.data.readers.hub import hub_dataset
from clipadapt.data.readers.lists import image_list
from clipadapt.data.readers.shards import webdataset
from clipadapt.data.readers.tables import image_table
from clipadapt.data.templates.sets import class_texts, template_sets, with_published_names
from clipadapt.renamed import old_names

if TYPE_CHECKING:
    from clipadapt.data.playground.drawing import Playground as Playground

__all__ = [
    "BytesItem",
    "Dataset",
    "EncodedItem",
    "Examples",
    "FileItem",
    "GeneratedItem",
    "ImageItem",
    "Item",
    "MultiLabelDataset",
    "Occurrence",
    "Pairs",
    "Playground",
    "Split",
    "Step",
    "as_items",
    "class_texts",
    "coop_split",
    "find_duplicates",
    "hub_dataset",
    "image_files",
    "image_folder",
    "image_list",
    "image_pairs",
    "image_table",
    "template_sets",
    "webdataset",
    "with_published_names",
]


def __getattr__(name: str) -> Any:
    if name == "Playground":  # imported on first use: most callers need no drawing code
        return import_module("clipadapt.data.playground.drawing").Playground
    return old_names(__name__)(name)
