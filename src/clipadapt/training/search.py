"""Choosing on validation data; ties go to the first, as the field does it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
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


def hits_along(start: Tensor, slope: Tensor, labels: Tensor, grid: Tensor) -> Tensor:
    """How many of V queries `start + g * slope` gets right, for each of the ascending numbers g: (A, G).

    start (A, V, C), slope (V, C), labels (V,), grid (G,). For each query the g that give its class the largest logit
    form an interval, so that no g is tried.
    """
    true = labels[:, None]  # (V, 1)
    lead = start.gather(2, true.expand(len(start), -1, -1)) - start  # (A, V, C), of the true class
    gain = slope.gather(1, true) - slope  # (V, C)
    bound = -lead / gain
    low = bound.masked_fill(gain <= 0, -torch.inf).amax(2)  # (A, V)
    high = bound.masked_fill(gain >= 0, torch.inf).amin(2)
    first_wins = torch.arange(start.shape[2]) < true  # of ties
    hopeless = ((gain == 0) & ((lead < 0) | ((lead == 0) & first_wins))).any(2)
    begin, end = torch.searchsorted(grid, low), torch.searchsorted(grid, high, right=True)
    right = ((begin < end) & ~hopeless).long()
    steps = torch.zeros(len(start), len(grid) + 1, dtype=torch.long)
    return steps.scatter_add(1, begin, right).scatter_add(1, end, -right).cumsum(1)[:, :-1]
