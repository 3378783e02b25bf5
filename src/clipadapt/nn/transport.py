"""Optimal transport between small sets of features, smoothed by entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def sinkhorn(cost: Tensor, epsilon: float = 0.1, *, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The cheapest plan that moves a set of equal weights to another: costs (..., P, N) -> (..., P, N) in float32.

        min over T of  sum T cost + epsilon sum T log T        rows of T sum to 1 / P, columns to 1 / N

    Sinkhorn's iterations (Cuturi, arXiv 1306.0895) on logarithms, which cannot overflow however small `epsilon` is.
    They end when no row of any plan misses its sum by more than the share `tolerance`, or after `iterations`; columns
    are exact. No gradient flows through the plan.
    """
    kernel = cost.float() / -epsilon  # (..., P, N)
    rows = columns = kernel.new_zeros(())  # log T = kernel + rows + columns
    for _ in range(iterations):
        wanted = -math.log(kernel.shape[-2]) - (kernel + columns).logsumexp(-1, keepdim=True)  # (..., P, 1)
        if bool(((wanted - rows).abs() <= tolerance).all()):  # the logarithm of what rows miss
            break
        rows = wanted
        columns = -math.log(kernel.shape[-1]) - (kernel + rows).logsumexp(-2, keepdim=True)  # (..., 1, N)
    return (kernel + rows + columns).exp()


def transport_similarity(left: Tensor, right: Tensor, epsilon: float = 0.1) -> Tensor:
    """Cosines of two sets of unit features (..., P, D) and (..., N, D), summed as the cheapest plan pairs them: (...).

    The cost of a pair is 1 - cosine. Gradients flow through the cosines, not through the plan (as in PLOT).
    """
    cosines = left.float() @ right.float().transpose(-1, -2)  # (..., P, N)
    return (sinkhorn(1 - cosines, epsilon) * cosines).sum((-2, -1))
