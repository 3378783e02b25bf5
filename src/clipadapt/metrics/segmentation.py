"""How good are maps of classes: intersection over union over a whole set of images."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def confusion(truth: ArrayLike, predicted: ArrayLike, classes: int, ignore: int = 255) -> np.ndarray:
    """(C, C) counts of pixels: rows are true classes, columns predicted ones.

    Args:
        truth: (H, W) ints in [0, classes); `ignore` marks pixels that do not count.
        predicted: (H, W) ints in [0, classes).
        classes: C.
        ignore: the value of pixels that are left out.

    Raises:
        ValueError: the two shapes differ.
    """
    true, found = np.asarray(truth), np.asarray(predicted)
    if true.shape != found.shape:
        raise ValueError(f"two maps of one shape are needed, not {true.shape} and {found.shape}")
    counted = true != ignore
    pairs = true[counted].astype(np.int64) * classes + found[counted]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def mean_iou(counts: np.ndarray) -> float:
    """Mean over classes of intersection over union, from `confusion` counts (C, C) summed over all images.

    Classes that are neither true nor predicted anywhere are left out; raises ValueError if none remains.
    """
    hits = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hits
    if not union.any():
        raise ValueError("mean_iou needs at least one pixel that counts")
    return float((hits[union > 0] / union[union > 0]).mean())
