"""How good are predictions where a picture has any number of labels: average precision, F1, and thresholds.

Everywhere `targets` is (N, C), true (or 1) where a picture shows a class; `scores` is (N, C), any finite numbers that
are higher where a class is more likely; `predicted` is (N, C), true where a class is predicted. Results are in [0, 1].
Arrays that do not fit together, and scores that are NaN, raise ValueError.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from clipadapt.metrics import average_precision, best_threshold, checked, mean_average_precision

__all__ = [
    "F1Scores",
    "average_precision",
    "best_threshold",
    "f1_scores",
    "mean_average_precision",
    "top_k_predictions",
]


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
        ValueError: there is no positive.
    """
    truth, taken = checked(targets, predicted)
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
    """(N, C) bool: the `k` highest classes of each picture, of equals the first; ValueError unless 1 <= k <= C."""
    _, values = checked(scores, scores)
    if not 1 <= k <= values.shape[1]:
        raise ValueError(f"k must lie between 1 and the number of classes ({values.shape[1]}), not {k}")
    predicted = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(predicted, np.argsort(-values, axis=1, kind="stable")[:, :k], True, axis=1)
    return predicted
