"""Images with any number of labels each: the data set, iterative stratification, few-shot sampling."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clipadapt.data.examples import Labelled
from clipadapt.errors import DataError


@dataclass(frozen=True, repr=False)
class MultiLabelDataset(Labelled[frozenset[int]]):
    """Images that each show any number of classes; `items`, `labels` and, if given, `domains` are parallel lists.

    `only` and `base_new_split` keep the images that show one of the classes in question, with those labels alone.
    So an image can be in both base and new, and one without labels is in neither.

    Attributes:
        items: N images, read lazily.
        labels: N sets of indices into `class_names`; empty where an image shows none of the classes.
        class_names: C names; a class may have no image.
        domains: N names of the domain (style, source, country, …) each image comes from, or None.
        name: what the data set is called in messages and results.

    Raises:
        DataError: the lists differ in length, a label is not a frozenset, or holds an index outside `class_names`.
    """

    def __post_init__(self) -> None:
        for index, label in enumerate(self.labels):
            if not isinstance(label, frozenset):
                raise DataError(f"{self.name}: the labels of image {index} are {label!r}; a frozenset is needed.")
        super().__post_init__()

    @staticmethod
    def classes_of(label: frozenset[int]) -> frozenset[int]:
        return label

    @staticmethod
    def _relabel(label: frozenset[int], new_label: Mapping[int, int]) -> frozenset[int]:
        return frozenset(new_label[c] for c in label if c in new_label)

    @property
    def targets(self) -> np.ndarray:  # type: ignore[override]
        """(N, C) bool: which image shows which class."""
        targets = np.zeros((len(self), len(self.class_names)), dtype=bool)
        for row, label in zip(targets, self.labels, strict=True):
            row[list(label)] = True
        return targets

    def split(self, test: float = 0.3, seed: int = 1) -> tuple[MultiLabelDataset, MultiLabelDataset]:
        """(train, test) by iterative stratification; about the share `test` in (0, 1) of every class goes to test.

        A class of two or more images should be in both, and that of a single one in train. Where classes always
        come together this cannot hold for all of them; it then holds for the rarer ones.
        """
        if not 0 < test < 1:
            raise DataError(f"test must be a fraction between 0 and 1 (such as 0.3), not {test}.")
        targets = _with_all(self.targets)
        positives = targets.sum(0)  # (C + 1,)
        held_out = np.clip(np.round(test * positives), np.minimum(1, positives - 1), positives - 1).clip(0)
        return self._hold_out(_stratify(targets, np.stack([positives - held_out, held_out]), seed)[1])

    def folds(self, k: int, seed: int = 1) -> list[tuple[MultiLabelDataset, MultiLabelDataset]]:
        """`k` pairs (train, held out) by iterative stratification; each image is held out once, in each fold some."""
        if not 2 <= k <= len(self):
            raise DataError(f"The number of folds must be between 2 and the number of images ({len(self)}), not {k}.")
        targets = _with_all(self.targets)
        return [self._hold_out(fold) for fold in _stratify(targets, np.tile(targets.sum(0) / k, (k, 1)), seed)]

    def few_shot(self, shots: int, seed: int = 1) -> MultiLabelDataset:
        """Images that show every class at least `shots` times, or as often as it occurs; in the order they have here.

        The images are shuffled. Then each class, the rarest first, takes the next images that show it until it has
        `shots`, where those taken for an earlier class count. So frequent classes can have more, and an image without
        labels is never taken.
        """
        return self.select(self.few_shot_indices(shots, seed))

    def few_shot_indices(self, shots: int, seed: int = 1) -> list[int]:
        """Which images `few_shot` takes, ascending."""
        if shots < 1:
            raise DataError(f"shots must be at least 1, not {shots}.")
        targets, order = self.targets, _permutation(len(self), random.Random(seed))
        chosen = np.zeros(len(self), dtype=bool)
        for c in targets.sum(0).argsort(kind="stable"):
            missing = max(0, shots - int(targets[chosen, c].sum()))
            chosen[order[targets[order, c] & ~chosen[order]][:missing]] = True
        return np.flatnonzero(chosen).tolist()


def _with_all(targets: np.ndarray) -> np.ndarray:
    """The targets and a last class that every image belongs to, (N, C + 1)."""
    return np.hstack([targets, np.ones((len(targets), 1), dtype=bool)])


def _stratify(targets: np.ndarray, wanted: np.ndarray, seed: int) -> list[list[int]]:
    """K disjoint lists of indices, ascending, by iterative stratification (Sechidis et al., ECML PKDD 2011).

    The class with the fewest images still to be dealt is dealt first, each image to the part that wants most of
    that class; ties go to the one that wants most images, then to a random one.

    Args:
        targets: (N, C + 1) bool; the last column is true throughout.
        wanted: (K, C + 1) how many positives of each class, and how many images in all, each part should get.
    """
    rng = random.Random(seed)
    order, wanted = _permutation(len(targets), rng), wanted.astype(float)
    part_of = np.full(len(targets), -1)
    left = targets.sum(0)  # (C + 1,) positives not dealt yet
    while left[-1]:
        # Images without any label come last: their class is the last one, which is at least as large as any.
        c = min(np.flatnonzero(left), key=lambda c: left[c])
        for index in order[targets[order, c] & (part_of[order] < 0)]:
            part = max(range(len(wanted)), key=lambda part: (wanted[part, c], wanted[part, -1], rng.random()))
            part_of[index] = part
            wanted[part] -= targets[index]
            left -= targets[index]
    return [np.flatnonzero(part_of == part).tolist() for part in range(len(wanted))]


def _permutation(n: int, rng: random.Random) -> np.ndarray:
    return np.array(rng.sample(range(n), n), dtype=int)
