"""Tip-Adapter: a key-value cache of the labelled pictures corrects the zero-shot classifier, without training.

    logits = s x T' + alpha * exp(-beta (1 - x K')) Y        K = support features, Y = their labels, one-hot

Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification" (arXiv 2207.09519), sections
3.1 and 4.3; grid and its order (beta outer, alpha inner, the first of equals wins) from the official repository
gaopengcuhk/Tip-Adapter. Departure: the official code averages ten augmented views for each key, here a key is the
plain picture; and a search needs a validation set of its own, never the test set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipadapt.methods.base import Card, FeatureMethod, Run, Support, hyper
from clipadapt.methods.registry import register
from clipadapt.training.search import hits_along


def cache_logits(images: Tensor, keys: Tensor, values: Tensor, beta: float) -> Tensor:
    """(M, D) queries, (N, D) keys, (N, C) one-hot values -> (M, C): exp(-beta (1 - affinity)) summed by class."""
    affinity = images @ keys.T  # (M, N)
    return (beta * affinity - beta).exp() @ values


def search(
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


@register
@dataclass(kw_only=True)
class TipAdapter(FeatureMethod):
    """A cache of support features added to zero-shot logits; alpha and beta are searched on `val` where it is given."""

    alpha: float = hyper(1.0, "weight of the cache against zero-shot, >= 0 (paper: 1)", low=0)
    beta: float = hyper(5.5, "sharpness of the affinities, >= 0 (paper: 5.5)", low=0)

    card = Card(
        key="tip-adapter",
        title="Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification",
        arxiv="2207.09519",
        family="training-free-few-shot",
        task="few-shot classification",
        trains="nothing",
        signal="labels",
    )
    search_space = {"alpha": (0.5, 1.0, 2.0, 5.0, 10.0, 20.0), "beta": (1.0, 2.0, 5.5, 10.0, 20.0, 40.0)}

    def _fit(self, support: Support, run: Run) -> None:
        self.weight_ = support.logit_scale * support.texts  # (C, D)
        self.keys_, self.values_ = support.images, support.one_hot  # (N, D), (N, C)
        self.beta_, self.alpha_ = self.beta, self.alpha
        if support.val is not None:
            x, y = support.val
            self.beta_, self.alpha_ = search(x @ self.weight_.T, x @ self.keys_.T, self.values_, y)

    def _logits(self, images: Tensor) -> Tensor:
        zero_shot = images @ self.weight_.T  # (M, C)
        return zero_shot + self.alpha_ * cache_logits(images, self.keys_, self.values_, self.beta_)
