"""The published searches for the factors of a cache, on validation data: Tip-Adapter's and SuS-X's grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipadapt.training.search import hits_along

STEPS = (20, 200, 50)  # of the published grid of SuS-X: alphas, betas, gammas


def best_cache(
    zero_shot: Tensor, affinity: Tensor, values: Tensor, labels: Tensor, scale: tuple[float, float] = (7.0, 3.0)
) -> tuple[float, float]:
    """The best (beta, alpha) on validation data, over the published grid of 200 betas x 20 alphas from 0.1 upwards.

    zero_shot (V, C), affinity (V, N), values (N, C), labels (V,). `scale` holds the upper ends, which like in the
    official code are never reached. exp() is taken once for each beta, and all alphas are judged at once: the choice
    of trying each of them, up to rounding.
    """
    beta_end, alpha_end = scale
    betas = [i * (beta_end - 0.1) / 200 + 0.1 for i in range(200)]
    alphas = [j * (alpha_end - 0.1) / 20 + 0.1 for j in range(20)]
    start, grid = zero_shot.double()[None], torch.tensor(alphas, dtype=torch.float64)
    hits = torch.cat(
        [hits_along(start, ((beta * affinity - beta).exp() @ values).double(), labels, grid) for beta in betas]
    )  # (betas, alphas)
    b, a = divmod(int(hits.argmax()), len(alphas))
    return betas[b], alphas[a]


def published_grid(steps: Sequence[int] = STEPS) -> tuple[list[float], list[float], list[float]]:
    """Alphas from 0.1, betas from 1 and gammas from 0.1 upwards; the upper ends 50, 50 and 30 are never reached."""
    alphas, betas, gammas = steps
    return (
        [i * (50 - 0.1) / alphas + 0.1 for i in range(alphas)],
        [j * (50 - 1) / betas + 1 for j in range(betas)],
        [k * (30 - 0.1) / gammas + 0.1 for k in range(gammas)],
    )


def best_signature_cache(
    zero_shot: Tensor,
    affinities: Sequence[Tensor],
    values: Tensor,
    kl_logits: Sequence[Tensor],
    labels: Tensor,
    steps: Sequence[int] = STEPS,
) -> tuple[float, float, float, int]:
    """The best (alpha, beta, gamma) on validation data, over the published grid, and which of the affinities it takes.

    zero_shot (V, C), values (N, C), labels (V,); K affinities (V, N) with their kl_logits (V, C), for SuS-X one of
    each. The loops are over alpha, beta, affinities and gamma, from outer to inner; ties go to the first. exp() is
    taken once for each beta, and all gammas are judged at once: the choice of trying each of them, up to rounding.
    """
    alphas, betas, gammas = published_grid(steps)
    scales, grid = torch.tensor(alphas).double()[:, None, None], torch.tensor(gammas).double()
    hits = [
        hits_along(zero_shot + scales * ((beta * affinity - beta).exp() @ values), kl.double(), labels, grid)
        for beta in betas
        for affinity, kl in zip(affinities, kl_logits, strict=True)
    ]
    table = torch.stack(hits, dim=1).unflatten(1, (len(betas), -1))  # (alphas, betas, K, gammas)
    a, b, k, g = (int(i) for i in torch.unravel_index(table.argmax(), table.shape))
    return alphas[a], betas[b], gammas[g], k
