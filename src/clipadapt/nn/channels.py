"""The channels of features that tell classes apart, by the criterion of APE (arXiv 2304.01195)."""

from __future__ import annotations

from torch import Tensor


def similarity(means: Tensor) -> Tensor:
    """Per channel (D,), the mean product of members of two different classes; class means (C, D).

    The products of all pairs of classes sum to (sum of means)^2 - sum of means^2: no loop over pairs.
    """
    classes, means = len(means), means.double()
    return (means.sum(0).square() - means.square().sum(0)) / (classes * (classes - 1))


def criterion(texts: Tensor, means: Tensor, balance: float) -> Tensor:
    """How well each channel (D,) tells the classes apart: unlike between them, and varied over their texts (C, D)."""
    return (1 - balance) * texts.double().var(dim=0) - balance * similarity(means)


def best_channels(score: Tensor, share: float) -> Tensor:
    """The numbers (Q,) of the `share` of channels with the largest score (D,), best first."""
    return score.topk(max(1, round(share * len(score)))).indices
