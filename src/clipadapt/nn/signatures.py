"""Signatures: how images relate to the texts of all classes, compared by divergence (SuS-X, arXiv 2211.16198)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipadapt.errors import ClipadaptError


def log_signature(images: Tensor, texts: Tensor, temperature: float) -> Tensor:
    """log p (N, C) of unit features (N, D) and texts (C, D): which classes an image resembles. Cosines, not logits."""
    return (images.double() @ texts.double().T / temperature).log_softmax(dim=1)


def divergence(queries: Tensor, keys: Tensor) -> Tensor:
    """KL(p_q | p_k) of log signatures (M, S), (N, S) -> (M, N): sum p log p - p log q, as two matrix products."""
    p = queries.exp()
    return (p * queries).sum(1, keepdim=True) - p @ keys.T


def divergence_classifier(keys: Tensor, values: Tensor) -> Tensor:
    """(S, C): what signatures p (M, S) are multiplied by for minus the divergence summed by class, up to p's own share.

    keys (N, S) log signatures, values (N, C) one-hot. See the module's docstring for classes of unequal size.
    """
    counts, values = values.sum(0), values.to(keys.dtype)
    shown = counts > 0
    means = values.T @ keys / counts.clamp(min=1)[:, None]  # (C, S)
    return ((means - means[shown].mean(0)) * shown[:, None] * counts[shown].mean()).T


def common_range(keys: Tensor, affinities: Sequence[tuple[float, Tensor, Tensor]]) -> float:
    """(range of affinities) / (range of divergences) over all pairs of two different support images; 0 if all agree.

    keys (N, S) log signatures; an affinity is the sum of weight * a @ b' over the given (weight, a (N, D), b (N, D)).
    """
    ends = torch.tensor([[torch.inf, -torch.inf]] * 2, dtype=torch.float64)
    for rows in torch.arange(len(keys)).split(1024):  # (N, N) at once would not fit for large support sets
        other = rows[:, None] != torch.arange(len(keys))
        affinity = torch.stack([weight * (a[rows] @ b.T) for weight, a, b in affinities]).sum(0)
        for end, values in zip(ends, (affinity, divergence(keys[rows], keys)), strict=True):
            if other.any():
                end[0], end[1] = min(end[0], values[other].min()), max(end[1], values[other].max())
    (low, high), (near, far) = ends.tolist()
    return (high - low) / (far - near) if far > near else 0.0


def official_affinity(divergences: Tensor, low: float, high: float, batch: int) -> Tensor:
    """Minus the divergences (M, N), brought to [low, high] by the least and largest of the whole matrix.

    As in the official code the queries behind the last full `batch` count as divergence 0.
    """
    kept = torch.arange(len(divergences)) < len(divergences) // batch * batch
    divergences = divergences * kept[:, None]
    near, far = divergences.min(), divergences.max()
    if far == near:
        raise ClipadaptError(f'scaling="official" needs at least {batch} different images at a time.')
    return -((divergences - near) / (far - near) * (high - low) + low)


def official_logits(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    affinity: Tensor,
    batch: int,
    ends: Sequence[float] | None = None,
) -> Tensor:
    """Minus the divergences summed by class (M, C), brought to `ends`, or else to the range of the affinities (M, N).

    queries (M, S), keys (N, S) log signatures, values (N, C) one-hot.
    """
    if len(queries) == 0:
        return affinity @ values
    low, high = ends or (float(affinity.min()), float(affinity.max()))
    return official_affinity(divergence(queries, keys), low, high, batch).to(affinity.dtype) @ values
