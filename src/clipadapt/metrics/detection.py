"""How good are boxes: average precision at an intersection over union of one half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image.

    Attributes:
        boxes: (n, 4) float: left, top, right, bottom in pixels.
        labels: (n,) ints into the class names.
        scores: (n,) float, higher where the detector is surer; all 1 in a ground truth.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) and (m, 4) -> their intersections over unions (n, m)."""
    left_top = np.maximum(a[:, None, :2], b[None, :, :2])
    right_bottom = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = (right_bottom - left_top).clip(min=0).prod(2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(1) for x in (a, b))
    return inside / np.maximum(area_a[:, None] + area_b - inside, 1e-12)


def average_precision_50(truth: Sequence[Boxes], found: Sequence[Boxes], classes: int) -> float:
    """Mean over classes with a true box of the average precision at IoU 0.5, over all images (AP50).

    A found box is a hit if it overlaps a true box of its class, not yet taken by a surer one, by at least one half. The
    area under precision over recall is exact, where the precision at a recall is the best at that recall or above.
    """
    precisions = [_of_class(truth, found, c) for c in range(classes) if any((t.labels == c).any() for t in truth)]
    if not precisions:
        raise ValueError("average_precision_50 needs at least one true box")
    return float(np.mean(precisions))


def _of_class(truth: Sequence[Boxes], found: Sequence[Boxes], c: int) -> float:
    scores, hits, total = [], [], 0
    for true, one in zip(truth, found, strict=True):
        boxes, own = true.boxes[true.labels == c], one.labels == c
        order = np.argsort(-one.scores[own], kind="stable")
        overlaps = iou(one.boxes[own][order], boxes)
        taken = np.zeros(len(boxes), dtype=bool)
        for row in overlaps:
            best = int(row.argmax()) if len(row) else 0
            hit = len(row) > 0 and row[best] >= 0.5 and not taken[best]
            if hit:
                taken[best] = True
            hits.append(hit)
        scores += one.scores[own][order].tolist()
        total += len(boxes)
    order = np.argsort(-np.array(scores), kind="stable")
    right = np.cumsum(np.array(hits, dtype=float)[order])
    precision = right / np.arange(1, len(right) + 1)
    best_after = np.maximum.accumulate(precision[::-1])[::-1]
    recall = np.concatenate([[0.0], right / total])
    return float((np.diff(recall) * best_after).sum())
