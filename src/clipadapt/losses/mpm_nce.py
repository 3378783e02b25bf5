"""MPM-NCE: InfoNCE for pairs whose captions repeat, with soft labels over all positives and a margin."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def mpm_nce(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    margin: float = 0.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Multi-Positive Margin NCE (R-Adapter, arXiv 2408.05749): all pairs of one label are positives of one another.

        s_ij = logit_scale (image_i . text_j + margin [y_i != y_j])
        t_ij = (1 - e) / P_i where y_i = y_j, else e / (B - P_i)        P_i = number of j with y_j = y_i; e = smoothing
        mean over i of  -sum_j t_ij (log softmax_j s_ij + log softmax_j s_ji) / 2

    Formula of the official repository tjddus9597/R-Adapter-ECCV2024. A row without negatives has all of its target on
    the positives, where the official code divides by zero.

    image, text: (B, D) unit-norm; row i of one belongs to row i of the other. labels: (B,). margin: >= 0, added to the
    cosines of negatives, so that positives must win by it. smoothing: in [0, 1). Returns a scalar in nats; without
    margin and smoothing, and where no label repeats, it is InfoNCE.
    """
    positive = labels[:, None] == labels[None, :]  # (B, B)
    count = positive.sum(1, keepdim=True)  # (B, 1)
    others = len(labels) - count
    mass = torch.where(others > 0, smoothing, 0.0)  # (B, 1) of the negatives
    target = torch.where(positive, (1 - mass) / count, mass / others.clamp(min=1))  # (B, B)
    cosines = image.float() @ text.float().T + margin * ~positive
    scores = logit_scale * cosines
    return (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2
