"""Labelled pictures: the data set, the published train/val/test split, duplicates; pictures in any form as items."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
from PIL import Image

from clipadapt.data.items import FileItem, ImageItem, Item
from clipadapt.data.splits import sample_shots, stratified_folds, stratified_split
from clipadapt.errors import DataError, unknown_name

Label = TypeVar("Label")


@dataclass(frozen=True, repr=False)
class Pictures(Generic[Label]):
    """What data sets have in common, whether a picture has one label or several."""

    items: list[Item]
    labels: list[Label]
    class_names: list[str]
    domains: list[str] | None = None
    name: str = "pictures"

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.items):
            raise DataError(f"{self.name}: {len(self.items)} pictures but {len(self.labels)} labels.")
        if self.domains is not None and len(self.domains) != len(self.items):
            raise DataError(f"{self.name}: {len(self.items)} pictures but {len(self.domains)} domains.")
        outside = {c for label in self.labels for c in self.classes_of(label)} - set(range(len(self.class_names)))
        if outside:
            raise DataError(
                f"{self.name}: label {min(outside)} does not point into its {len(self.class_names)} class names."
            )

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {len(self)} pictures, {len(self.class_names)} classes)"

    @staticmethod
    def classes_of(label: Label) -> Collection[int]:
        """The indices into `class_names` that a picture's label stands for."""
        raise NotImplementedError

    @property
    def paths(self) -> list[str]:
        """The pictures' names: their paths, where they are files."""
        return [item.name for item in self.items]

    @property
    def counts(self) -> list[int]:
        """Pictures per class, parallel to `class_names`."""
        counts = [0] * len(self.class_names)
        for label in self.labels:
            for c in self.classes_of(label):
                counts[c] += 1
        return counts

    def select(self, indices: Iterable[int]) -> Self:
        """The pictures at `indices`, in that order; class names stay as they are."""
        indices = [int(i) for i in indices]
        return replace(
            self,
            items=[self.items[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            domains=None if self.domains is None else [self.domains[i] for i in indices],
        )

    def only(self, classes: Sequence[str]) -> Self:
        """The pictures of `classes`, relabelled from 0 in the order given; the pictures keep their order."""
        return self._only([self._label(name) for name in classes])

    def rename(self, names: Mapping[str, str]) -> Self:
        """The same pictures under new class names, `{old: new}`; two classes cannot become one."""
        for old in names:
            self._label(old)
        renamed = [names.get(name, name) for name in self.class_names]
        for new in names.values():
            if renamed.count(new) > 1:
                merged = [old for old, name in zip(self.class_names, renamed, strict=True) if name == new]
                raise DataError(f"Renaming would merge the classes {' and '.join(map(repr, merged))} into {new!r}.")
        return replace(self, class_names=renamed)

    def base_new_split(self) -> tuple[Self, Self]:
        """(base, new): the first ceil(C/2) classes by label and the rest, each relabelled from 0 (arXiv 2203.05557)."""
        half = (len(self.class_names) + 1) // 2
        return self._only(range(half)), self._only(range(half, len(self.class_names)))

    def _only(self, old_labels: Sequence[int]) -> Self:
        new_label = {old: new for new, old in enumerate(old_labels)}
        if len(new_label) != len(old_labels):
            raise DataError(f"{self.name}: a class is asked for twice.")
        chosen = self.select(
            i for i, label in enumerate(self.labels) if not new_label.keys().isdisjoint(self.classes_of(label))
        )
        return replace(
            chosen,
            labels=[self._relabelled(label, new_label) for label in chosen.labels],
            class_names=[self.class_names[old] for old in old_labels],
        )

    @staticmethod
    def _relabelled(label: Label, new_label: Mapping[int, int]) -> Label:
        raise NotImplementedError

    def _label(self, name: str) -> int:
        if name not in self.class_names:
            raise unknown_name("class", name, self.class_names)
        if self.class_names.count(name) > 1:
            raise DataError(f"{self.name}: several classes are named {name!r}.")
        return self.class_names.index(name)

    def _hold_out(self, held_out: Sequence[int]) -> tuple[Self, Self]:
        """(the others, the pictures at `held_out`)."""
        out = set(held_out)
        return self.select(i for i in range(len(self)) if i not in out), self.select(held_out)


@dataclass(frozen=True, repr=False)
class Dataset(Pictures[int]):
    """Pictures with their classes; `items`, `labels` and, if given, `domains` are parallel lists.

    Attributes:
        items: N pictures, read lazily.
        labels: N indices into `class_names`.
        class_names: C names; a class may have no picture, and (as in ImageNet's published list) a name may recur.
        domains: N names of the domain (style, source, country, …) each picture comes from, or None.
        name: what the data set is called in messages and results.
    """

    @staticmethod
    def classes_of(label: int) -> tuple[int]:
        return (label,)

    @staticmethod
    def _relabelled(label: int, new_label: Mapping[int, int]) -> int:
        return new_label[label]

    def split(self, test: float = 0.3, seed: int = 1) -> tuple[Dataset, Dataset]:
        """(train, test), stratified: every class of two or more pictures is in both. `test` is a share in (0, 1)."""
        return self._hold_out(stratified_split(self.labels, test, seed)[1])

    def folds(self, k: int, seed: int = 1) -> list[tuple[Dataset, Dataset]]:
        """`k` pairs (train, held out) for cross-validation, stratified; each picture is held out once."""
        return [self._hold_out(fold) for fold in stratified_folds(self.labels, k, seed)]

    def few_shot(self, shots: int, seed: int = 1) -> Dataset:
        """`shots` pictures per class by the published rule (`splits.sample_shots`), all of a smaller class."""
        return self.select(sample_shots(self.labels, shots, random.Random(seed)))


@dataclass(frozen=True)
class Split:
    """The three parts of a published split; they share their class names."""

    train: Dataset
    val: Dataset
    test: Dataset

    def few_shot(self, shots: int, seed: int = 1) -> tuple[Dataset, Dataset]:
        """(train, val) with `shots` and min(`shots`, 4) pictures per class, drawn from one random stream as CoOp does.

        `Dataset.few_shot` of the train part with the same seed gives the same train pictures.
        """
        rng = random.Random(seed)
        train = self.train.select(sample_shots(self.train.labels, shots, rng))
        val = self.val.select(sample_shots(self.val.labels, min(shots, 4), rng))
        return train, val

    def base_new_split(self) -> tuple[Split, Split]:
        """(base, new), each part split as `Dataset.base_new_split`; the published order samples shots before this."""
        parts = [part.base_new_split() for part in (self.train, self.val, self.test)]
        return Split(*(base for base, _ in parts)), Split(*(new for _, new in parts))

    def duplicates(self) -> list[list[Occurrence]]:
        """Groups of identical pictures that lie in more than one part; such a picture is learned from and tested on."""
        groups = find_duplicates({"train": self.train, "val": self.val, "test": self.test})
        return [group for group in groups if len({occurrence.part for occurrence in group}) > 1]


@dataclass(frozen=True)
class Occurrence:
    """Where a picture that occurs several times lies."""

    part: str  # name of the data set, such as "train"
    index: int  # position in it
    name: str  # the picture's name
    class_name: str  # of several classes, their names joined by ", "


def find_duplicates(parts: Pictures[Any] | Mapping[str, Pictures[Any]]) -> list[list[Occurrence]]:
    """Groups of pictures with identical content (`Item.digest`) within one data set or across several named ones."""
    if isinstance(parts, Pictures):
        parts = {parts.name: parts}
    by_content: dict[str, list[Occurrence]] = {}
    for part, data in parts.items():
        for index, (item, label) in enumerate(zip(data.items, data.labels, strict=True)):
            class_name = ", ".join(data.class_names[c] for c in sorted(data.classes_of(label)))
            found = Occurrence(part, index, item.name, class_name)
            by_content.setdefault(item.digest(), []).append(found)
    return [group for group in by_content.values() if len(group) > 1]


def as_items(images: Any) -> list[Item]:
    """Pictures given in any of the usual forms, as items.

    Args:
        images: one picture or several: paths, PIL images, `Item`s, uint8 arrays (H,W), (H,W,3) or (H,W,4);
            a data set; or one uint8 array of N pictures, (N,H,W) or (N,H,W,3).

    Raises:
        DataError: something else is among them; paths are looked at only when they are read.
    """
    if isinstance(images, Item | str | Path | Image.Image):
        images = [images]
    elif isinstance(images, Pictures):
        return list(images.items)
    elif isinstance(images, np.ndarray):
        if images.ndim not in (3, 4) or (images.ndim == 3 and images.shape[-1] in (3, 4)):
            raise DataError(
                f"An array of pictures has shape (N,H,W,3) or (N,H,W), not {images.shape}; "
                "put a single picture in a list."
            )
    elif not isinstance(images, Iterable):
        raise DataError(f"Pictures are paths, PIL images, uint8 arrays or a dataset, not {type(images).__name__}.")
    return [_as_item(image, index) for index, image in enumerate(images)]


def _as_item(image: Any, index: int) -> Item:
    if isinstance(image, Item):
        return image
    if isinstance(image, str | Path):
        return FileItem(str(image))
    if isinstance(image, Image.Image):
        return ImageItem(getattr(image, "filename", "") or f"picture {index}", image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise DataError(f"Picture {index} is an array of {image.dtype}; uint8 values 0 to 255 are needed.")
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4))):
            raise DataError(f"Picture {index} has shape {image.shape}; (H,W), (H,W,3) or (H,W,4) is needed.")
        return ImageItem(f"picture {index}", Image.fromarray(image))
    raise DataError(f"Picture {index} is a {type(image).__name__}; a path, PIL image or uint8 array is needed.")
