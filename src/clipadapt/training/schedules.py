"""Learning-rate schedules: pure functions from a step to a factor in [0, 1] of the peak rate."""

from __future__ import annotations

import math


def cosine(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Linear warm-up to 1, then half a cosine down to `floor` (SGDR without restarts, arXiv 1608.03983).

    step: steps already taken, 0 for the first update. total: length of the run in steps, warm-up included.
    warmup: steps of warm-up; the first of them already moves (factor 1 / warmup). floor: the factor from `total` on.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_by_epoch(step: int, per_epoch: int, epochs: int, first: float) -> float:
    """The schedule of CoOp and its descendants: the first epoch at the factor `first`, then half a cosine by epoch.

    Epoch e >= 1 has the factor of the cosine at e - 1 of `epochs`, so the last one does not reach zero (as Dassl's
    constant warm-up does it). A run of one epoch has no warm-up.
    """
    epoch = step // per_epoch
    return first if epoch == 0 and epochs > 1 else cosine(max(epoch - 1, 0), epochs)
