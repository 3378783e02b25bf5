"""Data sets of the Hugging Face hub, through the `datasets` library (extra `[hub]`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clipadapt.data.examples import Dataset
from clipadapt.data.items import EncodedItem
from clipadapt.data.readers.lists import image_list
from clipadapt.errors import DataError


@dataclass(frozen=True)
class HubItem(EncodedItem):
    """One row of a `datasets.Dataset` whose only column holds undecoded images."""

    name: str
    rows: Any = field(repr=False)
    index: int

    def read(self) -> bytes:
        (cell,) = self.rows[self.index].values()
        if cell is None:
            raise DataError(f"{self.name} holds no images.")
        if cell["bytes"] is not None:
            return cell["bytes"]
        try:
            with open(cell["path"], "rb") as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error}.") from None


def hub_dataset(source: Any, split: str = "train", image: str | None = None, label: str | None = None) -> Dataset:
    """A `datasets.Dataset`, or the `split` of the data set with the hub id `source`; images are read lazily.

    Args:
        source: a `datasets.Dataset` in memory or on disk, or a hub id such as "cifar10".
        split: which part of a hub id to load; a `datasets.Dataset` is taken whole.
        image: the column of images; without it, the only one of type Image.
        label: the column of labels (ClassLabel, text or integers); without it, the only one of type ClassLabel.

    Raises:
        DataError: the extra or the data set is missing, or a column cannot be told or has no value in some row.
    """
    try:
        import datasets
    except ImportError:
        raise DataError('Hub data sets need an extra: pip install "clipadapt[hub]".') from None
    name = "hub data set"
    if isinstance(source, str):
        name = source
        try:
            source = datasets.load_dataset(source, split=split)
        except (OSError, ValueError) as error:
            raise DataError(f"The data set {name!r} (split {split!r}) cannot be loaded: {error}") from None
    if isinstance(source, datasets.DatasetDict):
        raise DataError(f"A dictionary of splits was given; choose one of {', '.join(source)}.")
    if not isinstance(source, datasets.Dataset):
        raise DataError(f"A datasets.Dataset or a hub id is needed, not {type(source).__name__}.")

    image = image or _only_column(source, datasets.Image)
    label = label or _only_column(source, datasets.ClassLabel)
    for column in (image, label):
        if column not in source.features:
            raise DataError(f"The data set has no column {column!r}; its columns are: {', '.join(source.features)}.")
    if not isinstance(source.features[image], datasets.Image):
        raise DataError(f"The column {image!r} does not hold images; its type must be datasets.Image.")
    labels = source[label][:]
    unlabelled = next((i for i, value in enumerate(labels) if value is None or value == -1), None)
    if unlabelled is not None:
        raise DataError(f"{name} row {unlabelled} has no label.")
    rows = source.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    items = [HubItem(f"{name} row {i}", rows, i) for i in range(len(rows))]
    return image_list(items, labels, getattr(source.features[label], "names", None), name=name)


def _only_column(source: Any, kind: type) -> str:
    found = [name for name, feature in source.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        argument = "image" if kind.__name__ == "Image" else "label"
        columns = ", ".join(source.features)
        raise DataError(f"{len(found)} columns are of type {kind.__name__}; name one by {argument}=…: {columns}.")
    return found[0]
