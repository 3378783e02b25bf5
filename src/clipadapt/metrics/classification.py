"""How good predictions are: accuracy with its interval, scores per class, and confusions.

Everywhere `labels` and `predicted` are parallel sequences (N,) of integers into the class names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class ClassScores:
    """One class: `support` images belong to it; a ratio whose denominator is zero is None.

    Attributes:
        recall: share of its images that are recognised; the class's accuracy.
        precision: share of the images taken for this class that belong to it.
        f1: harmonic mean of the two.
    """

    name: str
    support: int
    recall: float | None
    precision: float | None
    f1: float | None


def accuracy(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Share of correct predictions, in [0, 1]; raises ValueError if there are no images."""
    hits = np.asarray(labels) == np.asarray(predicted)
    if hits.size == 0:
        raise ValueError("accuracy needs at least one image")
    return float(hits.mean())


def macro_accuracy(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Mean of the classes' accuracies over those that have images: every class counts the same, however large."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    return float(np.mean([np.mean(predicted[labels == c] == c) for c in np.unique(labels)]))


def wilson(correct: float, total: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of `correct` among `total` (J. Am. Stat. Assoc. 22, 1927): (low, high).

    Unlike the interval from the standard error it stays in [0, 1] and is honest at 0 % and 100 %.
    """
    if total == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = correct / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = (z2 * share * (1 - share) / total + (z2 / (2 * total)) ** 2) ** 0.5 / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion_matrix(labels: ArrayLike, predicted: ArrayLike, classes: int) -> np.ndarray:
    """(C, C) counts: row = true class, column = predicted class."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(labels, dtype=int), np.asarray(predicted, dtype=int)), 1)
    return matrix


def per_class(labels: ArrayLike, predicted: ArrayLike, class_names: Sequence[str]) -> list[ClassScores]:
    """The scores of every class, in the order of `class_names`."""
    matrix = confusion_matrix(labels, predicted, len(class_names))
    hits, support, taken = np.diag(matrix), matrix.sum(1), matrix.sum(0)  # (C,) each
    return [
        ClassScores(name, int(n), _ratio(hit, n), _ratio(hit, t), _ratio(2 * hit, n + t))
        for name, hit, n, t in zip(class_names, hits, support, taken, strict=True)
    ]


def confusion_pairs(
    labels: ArrayLike, predicted: ArrayLike, class_names: Sequence[str], top: int = 10
) -> list[tuple[str, str, int]]:
    """The `top` most frequent mistakes as (true class, predicted class, count); ties in class order."""
    matrix = confusion_matrix(labels, predicted, len(class_names))
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:top]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, matrix.shape), strict=True)]
    return [(class_names[i], class_names[j], int(matrix[i, j])) for i, j in pairs if matrix[i, j]]


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
