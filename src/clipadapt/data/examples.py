"""Examples, items with a target each: data sets, published splits, streams, duplicates; images as items."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from PIL import Image

from clipadapt.data.items import FileItem, ImageItem, Item
from clipadapt.data.splits import class_groups, sample_shots, stratified_folds, stratified_split
from clipadapt.errors import DataError, unknown_name

Target = TypeVar("Target")
Label = TypeVar("Label")


class Examples(Generic[Target]):
    """Items with a target each: what all data sets have in common.

    Every kind is a frozen dataclass; `_parallel` names its lists of one entry per item.

    Attributes:
        items: N items, read lazily.
        targets: N targets, one per item: an index, a row of booleans, a mask, …
        domains: N names of the domain (style, source, country, …) each item comes from, or None.
        name: what the examples are called in messages and results.
    """

    items: list[Item]
    targets: Sequence[Target]
    domains: list[str] | None
    name: str
    _parallel: ClassVar[tuple[str, ...]] = ("items", "targets", "domains")
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        for what in self._parallel:
            values = getattr(self, what)
            if values is not None and len(values) != len(self.items):
                raise DataError(f"{self.name}: {len(self.items)} items but {len(values)} {what}.")

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {len(self)} items)"

    @property
    def paths(self) -> list[str]:
        """The items' names: their paths, where they are files."""
        return [item.name for item in self.items]

    def select(self, indices: Iterable[int]) -> Self:
        """The examples at `indices`, in that order; everything else stays as it is."""
        indices = [int(i) for i in indices]
        lists = {what: getattr(self, what) for what in self._parallel}
        return replace(self, **{k: None if v is None else [v[i] for i in indices] for k, v in lists.items()})

    def _hold_out(self, held_out: Sequence[int]) -> tuple[Self, Self]:
        """(the others, the examples at `held_out`)."""
        out = set(held_out)
        return self.select(i for i in range(len(self)) if i not in out), self.select(held_out)


@dataclass(frozen=True, repr=False)
class Labelled(Examples[Label]):
    """Images with classes, whether an image has one label or several; the targets are called `labels` here."""

    items: list[Item]
    labels: list[Label]
    class_names: list[str]
    domains: list[str] | None = None
    name: str = "images"

    _parallel: ClassVar[tuple[str, ...]] = ("items", "labels", "domains")

    def __post_init__(self) -> None:
        super().__post_init__()
        outside = {c for label in self.labels for c in self.classes_of(label)} - set(range(len(self.class_names)))
        if outside:
            raise DataError(
                f"{self.name}: label {min(outside)} is not an index into its {len(self.class_names)} class names."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {len(self)} images, {len(self.class_names)} classes)"

    @property
    def targets(self) -> Sequence[Label]:  # type: ignore[override]
        """The labels."""
        return self.labels

    @staticmethod
    def classes_of(label: Label) -> Collection[int]:
        """The indices into `class_names` that an image's label holds."""
        raise NotImplementedError

    @property
    def counts(self) -> list[int]:
        """Images per class, parallel to `class_names`."""
        counts = [0] * len(self.class_names)
        for label in self.labels:
            for c in self.classes_of(label):
                counts[c] += 1
        return counts

    def only(self, classes: Sequence[str]) -> Self:
        """The images of `classes`, relabelled from 0 in the order given; the images keep their order."""
        return self._only([self._label(name) for name in classes])

    def rename(self, names: Mapping[str, str]) -> Self:
        """The same images under new class names, `{old: new}`; two classes cannot become one."""
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
            raise DataError(f"{self.name}: a class is given twice.")
        chosen = self.select(
            i for i, label in enumerate(self.labels) if not new_label.keys().isdisjoint(self.classes_of(label))
        )
        return replace(
            chosen,
            labels=[self._relabel(label, new_label) for label in chosen.labels],
            class_names=[self.class_names[old] for old in old_labels],
        )

    @staticmethod
    def _relabel(label: Label, new_label: Mapping[int, int]) -> Label:
        raise NotImplementedError

    def _label(self, name: str) -> int:
        if name not in self.class_names:
            raise unknown_name("class", name, self.class_names)
        if self.class_names.count(name) > 1:
            raise DataError(f"{self.name}: several classes are named {name!r}.")
        return self.class_names.index(name)


@dataclass(frozen=True, repr=False)
class Dataset(Labelled[int]):
    """Images with their classes; `items`, `labels` and, if given, `domains` are parallel lists.

    Attributes:
        items: N images, read lazily.
        labels: N indices into `class_names`.
        class_names: C names; a class may have no image, and (as in ImageNet's published list) a name may recur.
        domains: N names of the domain (style, source, country, …) each image comes from, or None.
        name: what the data set is called in messages and results.
    """

    @staticmethod
    def classes_of(label: int) -> tuple[int]:
        return (label,)

    @staticmethod
    def _relabel(label: int, new_label: Mapping[int, int]) -> int:
        return new_label[label]

    def split(self, test: float = 0.3, seed: int = 1) -> tuple[Dataset, Dataset]:
        """(train, test), stratified: every class of two or more images is in both. `test` is a share in (0, 1)."""
        return self._hold_out(stratified_split(self.labels, test, seed)[1])

    def folds(self, k: int, seed: int = 1) -> list[tuple[Dataset, Dataset]]:
        """`k` pairs (train, held out) for cross-validation, stratified; each image is held out once."""
        return [self._hold_out(fold) for fold in stratified_folds(self.labels, k, seed)]

    def few_shot(self, shots: int, seed: int = 1) -> Dataset:
        """`shots` images per class by the published rule (`splits.sample_shots`), all of a smaller class."""
        return self.select(sample_shots(self.labels, shots, random.Random(seed)))

    def stream(self, tasks: int, seed: int | None = 1) -> list[Step]:
        """A class-incremental stream: the classes in `tasks` groups, and for each the images of its classes alone.

        Which classes a step has depends on their number, `tasks` and `seed` only, so train and test parts of a data
        set fall into the same steps.

        Args:
            tasks: number of steps; sizes differ by at most one class, the larger groups come first.
            seed: of the order of the classes; with None or 0 it is that of `class_names`.

        Raises:
            DataError: `tasks` is below 1, or a step would have fewer than two classes.
        """
        steps: list[Step] = []
        names: list[str] = []
        for number, group in enumerate(class_groups(len(self.class_names), tasks, seed), start=1):
            data = replace(self._only(group), name=f"{self.name}, task {number}")
            names += data.class_names
            steps.append(Step(f"task {number}", data, list(names)))
        return steps


@dataclass(frozen=True)
class Step:
    """One step of a class-incremental stream."""

    name: str  # "task 1", "task 2", …
    data: Dataset  # of this step's classes only, labelled from 0
    class_names: list[str]  # of all classes so far, those of this step last


@dataclass(frozen=True)
class Split:
    """The three parts of a published split; they share their class names."""

    train: Dataset
    val: Dataset
    test: Dataset

    def few_shot(self, shots: int, seed: int = 1) -> tuple[Dataset, Dataset]:
        """(train, val) with `shots` and min(`shots`, 4) images per class, drawn from one random stream as CoOp does.

        `Dataset.few_shot` of the train part with the same seed gives the same train images.
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
        """Groups of identical images in more than one part; such an image is both learned from and tested on."""
        groups = find_duplicates({"train": self.train, "val": self.val, "test": self.test})
        return [group for group in groups if len({occurrence.part for occurrence in group}) > 1]


@dataclass(frozen=True)
class Occurrence:
    """A place where an image that occurs several times is found."""

    part: str  # name of the data set, such as "train"
    index: int  # position in it
    name: str  # the image's name
    class_name: str  # of several classes, their names joined by ", "


def find_duplicates(parts: Labelled[Any] | Mapping[str, Labelled[Any]]) -> list[list[Occurrence]]:
    """Groups of images with identical content (`Item.digest`) within one data set or across several named ones."""
    if isinstance(parts, Labelled):
        parts = {parts.name: parts}
    by_content: dict[str, list[Occurrence]] = {}
    for part, data in parts.items():
        for index, (item, label) in enumerate(zip(data.items, data.labels, strict=True)):
            class_name = ", ".join(data.class_names[c] for c in sorted(data.classes_of(label)))
            found = Occurrence(part, index, item.name, class_name)
            by_content.setdefault(item.digest(), []).append(found)
    return [group for group in by_content.values() if len(group) > 1]


def as_items(images: Any) -> list[Item]:
    """Images given in any of the usual forms, as items.

    Args:
        images: one image or several: paths, PIL images, `Item`s, uint8 arrays (H,W), (H,W,3) or (H,W,4);
            a data set; or one uint8 array of N images, (N,H,W) or (N,H,W,3).

    Raises:
        DataError: something else is among them; paths are looked at only when they are read.
    """
    if isinstance(images, Item | str | Path | Image.Image):
        images = [images]
    elif isinstance(images, Examples):
        return list(images.items)
    elif isinstance(images, np.ndarray):
        if images.ndim not in (3, 4) or (images.ndim == 3 and images.shape[-1] in (3, 4)):
            raise DataError(
                f"An array of images has shape (N,H,W,3) or (N,H,W), not {images.shape}; put a single image in a list."
            )
    elif not isinstance(images, Iterable):
        raise DataError(f"Images are paths, PIL images, uint8 arrays or a dataset, not {type(images).__name__}.")
    return [_as_item(image, index) for index, image in enumerate(images)]


def _as_item(image: Any, index: int) -> Item:
    if isinstance(image, Item):
        return image
    if isinstance(image, str | Path):
        return FileItem(str(image))
    if isinstance(image, Image.Image):
        return ImageItem(getattr(image, "filename", "") or _unnamed(index), image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise DataError(f"Image {index} is an array of {image.dtype}; uint8 values 0 to 255 are needed.")
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4))):
            raise DataError(f"Image {index} has shape {image.shape}; (H,W), (H,W,3) or (H,W,4) is needed.")
        return ImageItem(_unnamed(index), Image.fromarray(image))
    raise DataError(f"Image {index} is a {type(image).__name__}; a path, PIL image or uint8 array is needed.")


def _unnamed(index: int) -> str:
    """The name of an image that has none; it identifies embeddings and benchmark results on disk."""
    return f"picture {index}"
