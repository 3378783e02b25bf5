"""Calibration and selective prediction: is a model as confident as it is accurate?

Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599); Geifman and El-Yaniv, "Selective
Classification for Deep Neural Networks" (arXiv 1705.08500).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor


def confidences(logits: Tensor, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and labels (N,) -> (the probability of the predicted class (N,), whether it is right (N,))."""
    top = logits.double().softmax(dim=1).max(dim=1)
    return top.values.numpy(), top.indices.numpy() == np.asarray(labels)


def expected_calibration_error(
    confidence: ArrayLike, hits: ArrayLike, bins: int = 15
) -> tuple[float, list[dict[str, Any]]]:
    """(ECE in [0, 1], the bins of the reliability diagram) over equal-width bins of the confidence.

    ECE is the mean over images of |accuracy - mean confidence| of the bin that an image falls in; bins are open
    below and closed above, as published, and empty ones are left out of the list.
    """
    confidence, hits = np.asarray(confidence, dtype=float), np.asarray(hits, dtype=float)
    if not len(confidence):
        raise ValueError("the calibration error needs at least one image")
    where = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (N,)
    error, found = 0.0, []
    for b in np.unique(where):
        inside = where == b
        right, sure = hits[inside].mean(), confidence[inside].mean()
        error += inside.mean() * abs(right - sure)
        found.append(
            {"bin": int(b), "pictures": int(inside.sum()), "confidence": float(sure), "accuracy": float(right)}
        )
    return float(error), found


def risk_coverage(confidence: ArrayLike, hits: ArrayLike) -> tuple[float, np.ndarray, np.ndarray]:
    """(area under the curve, coverage (N,), risk (N,)): the error among the images kept, the surest first.

    Images of equal confidence are partly kept: their errors are spread evenly over them, so the order of the
    images does not matter.
    """
    confidence, hits = np.asarray(confidence, dtype=float), np.asarray(hits, dtype=float)
    order = np.argsort(-confidence, kind="stable")
    _, group = np.unique(-confidence[order], return_inverse=True)
    errors = 1 - hits[order]
    spread = (np.bincount(group, errors) / np.bincount(group))[group]
    kept = np.arange(1, len(errors) + 1)
    risk = np.cumsum(spread) / kept
    return float(risk.mean()), kept / len(errors), risk


def temperature(logits: Tensor, labels: ArrayLike, steps: int = 60) -> float:
    """The T > 0 that makes softmax(logits / T) most likely, by golden-section search over log T in [-5, 5]."""
    targets = np.asarray(labels)
    x = logits.double().numpy()

    def loss(log_t: float) -> float:
        z = x / np.exp(log_t)
        z = z - z.max(axis=1, keepdims=True)
        return float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), targets]).mean())

    low, high, ratio = -5.0, 5.0, (5**0.5 - 1) / 2
    for _ in range(steps):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))
