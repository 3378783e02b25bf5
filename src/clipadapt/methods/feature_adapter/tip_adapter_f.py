"""Tip-Adapter-F: Tip-Adapter whose keys are fine-tuned, starting from the support features.

    min over K of  CE(s S T' + alpha * exp(-beta (1 - S K')) Y, y)        S = support features; Y stays fixed

Zhang et al. (arXiv 2207.09519), section 3.2; optimiser, schedule and start values from the official repository
gaopengcuhk/Tip-Adapter (AdamW 1e-3, eps 1e-4, weight decay 0.01, cosine to 0 over 20 epochs, batch 256, alpha 1.17,
beta 1). Departures: the official script keeps the epoch that is best on the *test* set; here the last epoch counts,
or with `epoch="val"` the best one on a validation set. Features are encoded once, without augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.methods.base import Card, Run, Support, hyper
from clipadapt.methods.registry import register
from clipadapt.methods.training_free_few_shot.tip_adapter import TipAdapter, cache_logits, search
from clipadapt.training.loop import batches, train
from clipadapt.training.schedules import cosine
from clipadapt.training.search import Best, accuracy_of


@register
@dataclass(kw_only=True)
class TipAdapterF(TipAdapter):
    """Tip-Adapter with trained keys; needs `val` only for `epoch="val"` and for searching alpha and beta."""

    alpha: float = hyper(1.17, "weight of the cache (official start value)", low=0)
    beta: float = hyper(1.0, "sharpness of the affinities (official start value)", low=0)
    lr: float = hyper(1e-3, "AdamW learning rate (paper)", low=0)
    epochs: int = hyper(20, "passes over the support set (paper)", low=1)
    batch_size: int = hyper(256, "pictures a step (official)", low=1)
    epoch: str = hyper("last", "which epoch's keys to keep", choices=("last", "val"))
    seed: int = hyper(1, "order of the pictures")

    card = Card(
        key="tip-adapter-f",
        title="Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification",
        arxiv="2207.09519",
        family="feature-adapter",
        task="few-shot classification",
        trains="cache keys",
        signal="labels",
    )
    search_space = {"alpha": (1.17, 5.0, 20.0), "beta": (1.0, 5.5, 20.0)}

    def _fit(self, support: Support, run: Run) -> None:
        self.weight_ = support.logit_scale * support.texts  # (C, D)
        self.values_ = support.one_hot  # (N, C)
        self.beta_, self.alpha_ = self.beta, self.alpha
        keys, zero_shot = support.images.clone().requires_grad_(), support.zero_shot
        best = Best([keys])  # the keys after the best epoch, where it is to be chosen
        steps = batches(len(keys), self.batch_size, epochs=self.epochs, seed=self.seed)
        per_epoch = len(steps) // self.epochs

        def loss_of(rows: Tensor) -> Tensor:
            cache = cache_logits(support.images[rows], keys, self.values_, self.beta)
            return cross_entropy(zero_shot[rows] + self.alpha * cache, support.labels[rows])

        def after_step(step: int) -> None:
            if support.val is not None and (step + 1) % per_epoch == 0:
                x, y = support.val
                with torch.no_grad():
                    logits = x @ self.weight_.T + self.alpha * cache_logits(x, keys, self.values_, self.beta)
                best.offer(accuracy_of(logits, y))

        choosing = self.epoch == "val" and support.val is not None
        train(
            loss_of,
            torch.optim.AdamW([keys], lr=self.lr, eps=1e-4, weight_decay=0.01),
            steps,
            schedule=lambda step: cosine(step, len(steps)),
            run=run,
            after_step=after_step if choosing else None,
            state=best.state if choosing else (),
        )
        if choosing:
            best.restore()
        self.keys_ = keys.detach()
        if support.val is not None:
            x, y = support.val
            self.beta_, self.alpha_ = search(x @ self.weight_.T, x @ self.keys_.T, self.values_, y)

    @property
    def trained_parameters(self) -> int:
        return self.keys_.numel()
