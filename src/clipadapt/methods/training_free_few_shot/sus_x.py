"""SuS-X: a cache of pictures that a generator or a search finds for the class names; besides their cosines to a query,
it compares how query and cached pictures relate to the texts of all classes (TIP-X).

    logits = s x T' + alpha exp(-beta (1 - x K')) Y - gamma c KL(p(x) | p(K)) Y
    p(z) = softmax(z T' / temperature)

K are the support pictures' features, Y their labels, one-hot; c brings the divergences to the range of the cosines.
Udandarao et al., "SuS-X: Training-Free Name-Only Transfer of Vision-Language Models" (arXiv 2211.16198). Of the paper
the abstract was read; formulas, temperature, grid (alpha outermost, then beta, gamma; the first
of equals wins) and how support sets come about (`clipadapt.sources.images`) are those of the official repository
vishaal27/SuS-X. With labelled pictures, this is TIP-X few-shot; alpha and beta of a fit without `val` are
Tip-Adapter's, gamma is ours.

Departures. The official code maps the divergences to the range of the cosines by the least and largest value of the
whole matrix of queries, so that a prediction depends on the other pictures of the call; it counts queries behind the
last full hundred as divergence 0; and for test pictures it takes the range of the validation pictures' cosines. All
this is `scaling="official"`. Here c = (range of cosines) / (range of divergences) over the pairs of different support
pictures, fixed by `fit`. And where classes have unequally many pictures, the mean divergence of each counts as often
as classes have pictures on average (a class without any is taken to be as near as the mean of the others); a sum would
favour or punish a class for their number alone. Then what all classes share can be left out: the entropy of p(x), and
the constants of the mapping. What remains is linear in p(x), so that no query is compared with a support picture:

    - gamma c n sum_s p_s(x) (H_cs - mean_c H_cs)        H_c = - mean of log p(K) over class c, n pictures a class
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.methods.base import Card, FeatureMethod, Run, Support, hyper
from clipadapt.methods.registry import register
from clipadapt.methods.training_free_few_shot.tip_adapter import cache_logits
from clipadapt.sources.images import support_of
from clipadapt.training.search import hits_along

STEPS = (20, 200, 50)  # of the published grid: alphas, betas, gammas
BATCH = 100  # the official code's, which leaves its remainder out


def log_signature(images: Tensor, texts: Tensor, temperature: float) -> Tensor:
    """log p (N, C) of unit features (N, D) and texts (C, D): which classes a picture resembles. Cosines, not logits."""
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
    """(range of affinities) / (range of divergences) over all pairs of two different support pictures; 0 if all agree.

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
        raise ClipadaptError(f'scaling="official" needs at least {batch} different pictures at a time.')
    return -((divergences - near) / (far - near) * (high - low) + low)


def published_grid(steps: Sequence[int] = STEPS) -> tuple[list[float], list[float], list[float]]:
    """Alphas from 0.1, betas from 1 and gammas from 0.1 upwards; the upper ends 50, 50 and 30 are never reached."""
    alphas, betas, gammas = steps
    return (
        [i * (50 - 0.1) / alphas + 0.1 for i in range(alphas)],
        [j * (50 - 1) / betas + 1 for j in range(betas)],
        [k * (30 - 0.1) / gammas + 0.1 for k in range(gammas)],
    )


def search(
    zero_shot: Tensor,
    affinities: Sequence[Tensor],
    values: Tensor,
    kl_logits: Sequence[Tensor],
    labels: Tensor,
    steps: Sequence[int] = STEPS,
) -> tuple[float, float, float, int]:
    """The best (alpha, beta, gamma) on validation data, over the published grid, and which of the affinities it takes.

    zero_shot (V, C), values (N, C), labels (V,); K affinities (V, N) with their kl_logits (V, C), for SuS-X one of
    each. The loops are over alpha, beta, affinities and gamma, from outer to inner; the first of equals wins. exp() is
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


def joined(support: Dataset, more: Dataset) -> Dataset:
    """The pictures of two data sets with the same class names."""
    return replace(support, items=[*support.items, *more.items], labels=[*support.labels, *more.labels], domains=None)


@register
@dataclass(kw_only=True)
class SusX(FeatureMethod):
    """TIP-X on labelled pictures, or on those that `source` has of the class names; what is searched needs `val`.

    `source` is what `clipadapt.sources.images.image_source` takes: a data set, a folder of classes, "playground", or
    a source such as `Retrieved` and `Generated`. With it `fit(backbone, class_names=[...])` suffices; labelled
    pictures are added to its own. A saved model keeps its name, not its pictures.
    """

    alpha: float = hyper(
        1.0, "weight of the cache against zero-shot, >= 0 (Tip-Adapter; official range: 0.1-50)", low=0
    )
    beta: float = hyper(5.5, "sharpness of the affinities, >= 0 (Tip-Adapter; official range: 1-50)", low=0)
    gamma: float = hyper(1.0, "weight of the divergences, >= 0; 0 is Tip-Adapter (official range: 0.1-30)", low=0)
    temperature: float = hyper(0.5, "of signatures, divides cosines, > 0 (official)", low=1e-3)
    scaling: str = hyper("support", "where the range of divergences is taken from", choices=("support", "official"))
    source: Any = hyper(None, 'support pictures: a data set, a folder of classes, "playground", a source, or None')
    per_class: int = hyper(16, "pictures of each class that a source makes", low=1)
    seed: int = hyper(1, "of the pictures that a source makes")

    card = Card(
        key="sus-x",
        title="SuS-X: Training-Free Name-Only Transfer of Vision-Language Models",
        arxiv="2211.16198",
        family="training-free-few-shot",
        task="few-shot classification",
        trains="nothing",
        signal="labels",
    )
    search_space = {"alpha": (1.0, 5.0, 20.0), "beta": (5.5, 20.0), "gamma": (0.1, 1.0, 5.0, 20.0)}

    def _check_signal(self, n_labelled: int, n_unlabelled: int) -> None:
        super()._check_signal(n_labelled or int(self.source is not None), n_unlabelled)

    def _fit_towers(
        self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run, unlabelled: Any = None
    ) -> None:
        if self.source is not None:
            made = support_of(self.source, backbone, support.class_names, self.per_class, self.seed)
            support = joined(support, made)
        super()._fit_towers(backbone, support, val, run)

    def _fit(self, support: Support, run: Run) -> None:
        if len(support.images) == 0:  # of fit_features: there is no backbone for a source
            raise ClipadaptError("sus-x: a source needs fit(backbone, ...); fit_features needs labelled features.")
        self.weight_ = support.logit_scale * support.texts  # (C, D)
        self.keys_, self.values_ = support.images, support.one_hot  # (N, D), (N, C)
        self.texts_ = support.texts
        keys = log_signature(support.images, support.texts, self.temperature)  # (N, C)
        self.signatures_, self.range_ = keys, None
        if self.scaling == "support":
            scale = common_range(keys, [(1.0, self.keys_, self.keys_)])
            self.signatures_ = scale * divergence_classifier(keys, self.values_)  # (C, C)
        self.alpha_, self.beta_, self.gamma_ = self.alpha, self.beta, self.gamma
        if support.val is not None:
            x, y = support.val
            affinity = x @ self.keys_.T
            if self.scaling == "official":
                self.range_ = [float(affinity.min()), float(affinity.max())]
            best = search(x @ self.weight_.T, [affinity], self.values_, [self._kl_logits(x)], y)
            self.alpha_, self.beta_, self.gamma_ = best[:3]

    def _kl_logits(self, images: Tensor) -> Tensor:
        signatures = log_signature(images, self.texts_, self.temperature)  # (M, C)
        if self.scaling == "support":
            return (signatures.exp() @ self.signatures_).to(images.dtype)
        affinity = images @ self.keys_.T  # (M, N)
        if len(images) == 0:
            return affinity @ self.values_
        low, high = self.range_ or (float(affinity.min()), float(affinity.max()))
        divergences = divergence(signatures, self.signatures_)
        return official_affinity(divergences, low, high, BATCH).to(images.dtype) @ self.values_

    def _logits(self, images: Tensor) -> Tensor:
        cache = cache_logits(images, self.keys_, self.values_, self.beta_)  # (M, C)
        return images @ self.weight_.T + self.alpha_ * cache + self.gamma_ * self._kl_logits(images)
