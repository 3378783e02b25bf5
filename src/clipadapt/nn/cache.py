"""A key-value cache of labelled images, as in Tip-Adapter (arXiv 2207.09519)."""

from __future__ import annotations

from torch import Tensor


def cache_logits(images: Tensor, keys: Tensor, values: Tensor, beta: float) -> Tensor:
    """(M, D) queries, (N, D) keys, (N, C) one-hot values -> (M, C): exp(-beta (1 - affinity)) summed by class."""
    affinity = images @ keys.T  # (M, N)
    return (beta * affinity - beta).exp() @ values
