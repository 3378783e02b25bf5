"""Tip-Adapter-F: Tip-Adapter whose keys are fine-tuned, starting from the support features.

    min over K of  CE(s S T' + alpha * exp(-beta (1 - S K')) Y, y)        S = support features; Y stays fixed

Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification" (arXiv 2207.09519), section
3.2; optimiser, schedule and start values from the official repository gaopengcuhk/Tip-Adapter (AdamW 1e-3, eps 1e-4,
weight decay 0.01, cosine to 0 over 20 epochs, batch 256, alpha 1.17, beta 1). Departures: the official script keeps the
epoch that is best on the *test* set; here the last epoch counts, or with `epoch="val"` the best one on a validation
set. Features are encoded once, without augmentation.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.methods import Classifier, Run, Support, hyper, method
from clipadapt.methods.kinds.caches import CacheMethod
from clipadapt.nn.cache import cache_logits
from clipadapt.training.cache_search import best_cache
from clipadapt.training.search import best_on


@method(
    "tip-adapter-f",
    title="Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification",
    arxiv="2207.09519",
    trains="cache keys",
)
class TipAdapterF(CacheMethod, Classifier):
    """Tip-Adapter with trained keys; needs `val` only for `epoch="val"` and for searching alpha and beta.

    >>> model = create("tip-adapter-f", epochs=2).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    alpha: float = hyper(1.17, "weight of the cache (official start value)", low=0)
    beta: float = hyper(1.0, "sharpness of the affinities (official start value)", low=0)
    lr: float = hyper(1e-3, "AdamW learning rate (paper)", low=0)
    epochs: int = hyper(20, "passes over the support set (paper)", low=1)
    batch_size: int = hyper(256, "images a step (official)", low=1)
    epoch: str = hyper("last", "which epoch's keys to keep", choices=("last", "val"))
    seed: int = hyper(1, "order of the images")

    search_space = {"alpha": (1.17, 5.0, 20.0), "beta": (1.0, 5.5, 20.0)}

    def _fit(self, support: Support, run: Run) -> None:
        keys, values, zero_shot = support.images.clone().requires_grad_(), support.one_hot, support.zero_shot

        def loss_of(rows: Tensor) -> Tensor:
            cache = cache_logits(support.images[rows], keys, values, self.beta)
            return cross_entropy(zero_shot[rows] + self.alpha * cache, support.labels[rows])

        optimizer = torch.optim.AdamW([keys], lr=self.lr, eps=1e-4, weight_decay=0.01)
        history = self._descend(loss_of, optimizer, support, run, every_epoch=self.epoch == "val")
        self.weight_ = support.logit_scale * support.texts  # (C, D)
        self.keys_, self.values_ = keys.detach(), values  # (N, D), (N, C)
        self.beta_, self.alpha_ = self.beta, self.alpha
        if support.val is not None:
            x, y = support.val
            plain = x @ self.weight_.T  # (V, C)
            if self.epoch == "val":
                tried = ((k, plain + self.alpha * cache_logits(x, k, values, self.beta)) for k in history[0])
                self.keys_ = best_on(y, tried)[0]
            self.beta_, self.alpha_ = best_cache(plain, x @ self.keys_.T, values, y)
