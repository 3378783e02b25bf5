"""How good are predictions where an image has any number of labels: average precision, F1, and thresholds.

Everywhere `targets` is (N, C), true (or 1) where an image shows a class; `scores` is (N, C), any finite numbers that
are higher where a class is more likely; `predicted` is (N, C), true where a class is predicted. Results are in [0, 1].
Arrays that do not fit together, and scores that are NaN, raise ValueError.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


def average_precision(targets: ArrayLike, scores: ArrayLike) -> np.ndarray:
    """(C,) average precision of each class, nan for a class without a positive.

    It is the mean, over a class's positives, of the precision among the images that score at least as high; nothing
    is interpolated, and equal scores count together (as in scikit-learn).
    """
    truth, values = check(targets, scores)
    result = np.full(truth.shape[1], np.nan)
    for c in np.flatnonzero(truth.any(0)):
        hits, taken, _ = _sweep(truth[:, c], values[:, c])
        result[c] = np.sum(np.diff(hits, prepend=0) * hits / taken) / hits[-1]
    return result


def mean_average_precision(targets: ArrayLike, scores: ArrayLike) -> float:
    """Mean of the classes' average precisions (mAP) over those with a positive; raises ValueError if there is none."""
    precisions = average_precision(targets, scores)
    if np.isnan(precisions).all():
        raise ValueError("mean_average_precision needs at least one positive")
    return float(np.nanmean(precisions))


def best_threshold(targets: ArrayLike, scores: ArrayLike) -> float:
    """The threshold t for which predicting `scores >= t` has the highest overall F1, among all scores.

    It is midway between the lowest score that it accepts and the next one below; of equally good ones it is the
    highest. Choose it on support or validation images, never on those that are tested. Without a positive it raises
    ValueError.
    """
    truth, values = check(targets, scores)
    if not truth.any():
        raise ValueError("best_threshold needs at least one positive")
    hits, taken, levels = _sweep(truth.ravel(), values.ravel())
    best = int(np.argmax(2 * hits / (taken + hits[-1])))
    lowest, below = levels[best], levels[min(best + 1, len(levels) - 1)]
    middle = lowest / 2 + below / 2  # in the scores' own precision, so that comparing with them is exact
    return float(middle if below < middle < lowest else lowest)


def _sweep(truth: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every distinct score, highest first: positives and images that score at least it, and the score."""
    order = np.argsort(-values, kind="stable")
    values = values[order]
    last = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # of each run of equal scores
    return np.cumsum(truth[order])[last], last + 1, values[last]


def check(targets: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Targets as bool and scores as floats, (N, C) each."""
    truth, values = np.asarray(targets).astype(bool), np.asarray(scores)
    if truth.ndim != 2 or truth.shape != values.shape:
        raise ValueError(f"two arrays of one shape (N, C) are needed, not {truth.shape} and {values.shape}")
    if np.isnan(values).any():
        raise ValueError("scores are NaN")
    return truth, values if values.dtype.kind == "f" else values.astype(float)


class F1Scores(NamedTuple):
    """The two figures that papers call OF1 and CF1."""

    overall: float
    per_class: float


def f1_scores(targets: ArrayLike, predicted: ArrayLike) -> F1Scores:
    """Overall and per-class F1, as the multi-label literature defines them (evaluated so by ML-GCN, arXiv 1904.03582).

    The overall one (OF1, "micro") is the harmonic mean of precision and recall over all N·C decisions. The per-class
    one (CF1) is the harmonic mean of the classes' mean precision and their mean recall; this is not the mean of the
    classes' F1, which scikit-learn calls "macro". A class never predicted has precision 0; one without a positive is
    left out of the means, though what is predicted of it counts in the overall F1.

    Raises:
        ValueError: there are no positives.
    """
    truth, taken = check(targets, predicted)
    taken = taken.astype(bool)
    hits, positives, predictions = (truth & taken).sum(0), truth.sum(0), taken.sum(0)  # (C,) each
    if not positives.any():
        raise ValueError("f1_scores needs at least one positive")
    overall = 2 * hits.sum() / (positives.sum() + predictions.sum())
    seen = positives > 0
    precision = np.mean(hits[seen] / np.maximum(predictions[seen], 1))
    recall = np.mean(hits[seen] / positives[seen])
    return F1Scores(float(overall), float(2 * precision * recall / (precision + recall)) if hits.any() else 0.0)


def top_k_predictions(scores: ArrayLike, k: int) -> np.ndarray:
    """(N, C) bool: the `k` highest classes of each image, ties to the first; ValueError unless 1 <= k <= C."""
    _, values = check(scores, scores)
    if not 1 <= k <= values.shape[1]:
        raise ValueError(f"k must be between 1 and the number of classes ({values.shape[1]}), not {k}")
    predicted = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(predicted, np.argsort(-values, axis=1, kind="stable")[:, :k], True, axis=1)
    return predicted
