"""APE: Tip-Adapter on the channels that tell the classes apart, each cache entry weighted by CLIP's surprise at it.

    J = -b * sim + (1 - b) * var        sim: similarity between classes, var: variance over classes, channel by channel
    logits = s x T' + alpha * exp(-beta (1 - x~ K~')) (Y * exp(gamma KL(Y | softmax(K~ T~'))))

x~, K~, T~ are queries, support features and texts on the channels of the largest J, brought back to unit length. Zhu et
al., "Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement" (arXiv 2304.01195), sections 3.1
and 3.2; b = 0.7, the start values and the grid (beta, alpha, gamma from outer to inner, ties go to the first) are
those of the official repository yangyangyang127/APE for ImageNet, where 500 of 1,024 channels are kept.

The paper finds channels from the texts alone; the official code of this variant counts a class's support images as
its members next to its text: `prototypes="texts+pictures"`. The softmax takes plain cosines, as there, so the weights
are nearly equal. Departures: J is taken from class means instead of a loop over all pairs (equal where classes have
equally many images; else each class counts the same, as in the paper); one plain view instead of ten augmented ones;
prompt templates are the user's choice (the paper's texts include sentences of a language model).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.methods import Classifier, FeatureMethod, Run, Support, hyper, method
from clipadapt.nn.cache import cache_logits
from clipadapt.nn.channels import best_channels, criterion
from clipadapt.training.search import best_on


def class_means(texts: Tensor, images: Tensor, one_hot: Tensor) -> Tensor:
    """Mean (C, D) of a class's text (C, D) and its images: images (N, D), one_hot (N, C). Not of unit length."""
    return (texts + one_hot.T @ images) / (1 + one_hot.sum(0))[:, None]


def divergence(keys: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
    """Bits (N,) of KL divergence of the labels (N,) from the unscaled prediction of keys (N, Q) with texts (C, Q)."""
    own = (keys @ texts.T).softmax(dim=1).gather(1, labels[:, None])[:, 0]  # (N,)
    return torch.log2((1 + 1e-6) / (own + 1e-6))


def search(
    zero_shot: Tensor, affinity: Tensor, values: Tensor, surprise: Tensor, labels: Tensor
) -> tuple[float, float, float]:
    """The best (beta, alpha, gamma) on validation data, over the published grid of 200 x 20 x 5.

    zero_shot (V, C), affinity (V, N), values (N, C), surprise (N,) from `divergence`, labels (V,). exp() is taken once
    for each beta, and the cache summed once for each beta and gamma: alpha only scales its result.
    """
    gammas = [k * 0.5 / 5 for k in range(5)]
    weighted = torch.cat([values * (gamma * surprise).exp()[:, None] for gamma in gammas], dim=1)  # (N, 5 C)

    def grid() -> Iterator[tuple[tuple[float, float, float], Tensor]]:
        for i in range(200):
            beta = i * (7 - 0.1) / 200 + 0.1
            caches = ((beta * affinity - beta).exp() @ weighted).chunk(len(gammas), dim=1)  # of (V, C)
            for j in range(20):
                alpha = j * (7 - 0.1) / 20 + 0.1
                for gamma, cache in zip(gammas, caches, strict=True):
                    yield (beta, alpha, gamma), zero_shot + alpha * cache

    return best_on(labels, grid())[0]


@method(
    "ape",
    title="Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement",
    arxiv="2304.01195",
)
class Ape(FeatureMethod, Classifier):
    """A cache on refined channels; alpha, beta and gamma are searched on `val` where it is given.

    >>> model = create("ape", alpha=1.0).fit(backbone, support, val=val)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    alpha: float = hyper(2.0, "weight of the cache against zero-shot, >= 0 (official start value)", low=0)
    beta: float = hyper(1.0, "sharpness of the affinities, >= 0 (official start value)", low=0)
    gamma: float = hyper(0.1, "how much more a surprising cache entry weighs, >= 0 (official start value)", low=0)
    share: float = hyper(
        500 / 1024, "share of channels kept, in [0, 1]; at least one (official: 0.49-0.88)", low=0, high=1
    )
    balance: float = hyper(0.7, "weight of similarity against variance, in [0, 1] (official)", low=0, high=1)
    prototypes: str = hyper(
        "texts", "what similarity between classes is taken from", choices=("texts", "texts+pictures")
    )

    search_space = {"alpha": (2.0, 7.0, 20.0), "beta": (1.0, 5.5), "share": (0.5, 0.75)}

    def _fit(self, support: Support, run: Run) -> None:
        images, texts = support.images, support.texts
        means = texts if self.prototypes == "texts" else class_means(texts, images, support.one_hot)
        self.channels_ = best_channels(criterion(texts, means, self.balance), self.share)  # (Q,)
        self.weight_ = support.logit_scale * texts  # (C, D)
        self.keys_ = self._refine(images)  # (N, Q)
        surprise = divergence(self.keys_, self._refine(texts), support.labels)  # (N,)
        self.beta_, self.alpha_, self.gamma_ = self.beta, self.alpha, self.gamma
        if support.val is not None:
            x, y = support.val
            affinity = self._refine(x) @ self.keys_.T
            self.beta_, self.alpha_, self.gamma_ = search(x @ self.weight_.T, affinity, support.one_hot, surprise, y)
        self.values_ = support.one_hot * (self.gamma_ * surprise).exp()[:, None]  # (N, C)

    def _refine(self, features: Tensor) -> Tensor:
        return normalize(features[:, self.channels_], dim=1)  # (M, Q)

    def _logits(self, images: Tensor) -> Tensor:
        zero_shot = images @ self.weight_.T  # (M, C)
        return zero_shot + self.alpha_ * cache_logits(self._refine(images), self.keys_, self.values_, self.beta_)
