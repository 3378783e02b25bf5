"""Choosing a coefficient on validation data: `argmax` over a grid, the first of equals, as the field does it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def best_on(labels: Tensor, candidates: Iterable[tuple[T, Tensor]]) -> tuple[T, float]:
    """Of (setting, logits (V, C)) pairs, the first with the highest accuracy on labels (V,), and that accuracy."""
    best: tuple[T, float] | None = None
    for setting, logits in candidates:
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        if best is None or accuracy > best[1]:
            best = setting, accuracy
    if best is None:
        raise ValueError("best_on needs at least one candidate")
    return best
