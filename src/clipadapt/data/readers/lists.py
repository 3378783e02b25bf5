"""Data sets from plain lists: images in any form with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipadapt.data.examples import Dataset, as_items
from clipadapt.errors import DataError, unknown_name


def image_list(
    images: Any,
    labels: Sequence[Any],
    class_names: Sequence[str] | None = None,
    *,
    domains: Sequence[str] | None = None,
    name: str = "images",
) -> Dataset:
    """A data set from images and labels in memory.

    Args:
        images: N images in any form `as_items` takes: paths, PIL images, uint8 arrays, one (N,H,W,3) array.
        labels: N class names, or N integers into `class_names`.
        class_names: all classes, in the order of the labels; without it, the labels that occur, sorted
            (numbers by value).
        domains: N names of domains.
        name: what to call the data set.

    Raises:
        DataError: lengths differ, a label is missing, or an integer label is outside `class_names`.
    """
    items = as_items(images)
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if not items:
        raise DataError(f"{name} holds no image.")
    for index, value in enumerate(values):
        if not isinstance(value, str | int) or value == "":
            raise DataError(f"{name}: image {index} has the label {value!r}; a class name or integer is needed.")
    if class_names is None:
        values = [str(value) for value in values]
        class_names = sorted(set(values))
        if all(name.isdecimal() for name in class_names):
            class_names.sort(key=int)
    elif isinstance(class_names, str):
        raise DataError(f"class_names is the string {class_names!r}; a list of names is needed.")
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    unknown = next((value for value in values if isinstance(value, str) and value not in label_of), None)
    if unknown is not None:
        raise unknown_name("class", unknown, class_names)
    indices = [label_of[value] if isinstance(value, str) else int(value) for value in values]
    return Dataset(items, indices, list(class_names), None if domains is None else list(domains), name)
