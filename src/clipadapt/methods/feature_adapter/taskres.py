"""TaskRes: a residual of its own for each class text, free of what the texts themselves know.

    min over R of  CE(s S unit(T + a R)', y)        R (C, D) starts at zero; S = support features

Yu et al., "Task Residual for Tuning Vision-Language Models" (arXiv 2211.10277), section 3.2; optimiser and schedule
from the official repository geekyutao/TaskRes (a = 0.5; Adam 2e-3 with weight decay 5e-4 in the gradient, batch 256,
cosine by epoch after one epoch at 1e-5; 100 epochs up to 4 shots, 200 for more).

Departures: T are unit vectors here, the official code adds R to texts of their original length, next to which the same
step is smaller; features are encoded once, without augmentation; the "enhanced base" (a text projection tuned
beforehand) is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipadapt.methods.base import Card, FeatureMethod, Run, Support, hyper
from clipadapt.methods.registry import register
from clipadapt.training.loop import batches, train
from clipadapt.training.schedules import cosine


def classifier(texts: Tensor, residual: Tensor, scale: float) -> Tensor:
    """Unit class weights (C, D) from texts (C, D) and their residuals (C, D)."""
    return normalize(texts + scale * residual, dim=1)


@register
@dataclass(kw_only=True)
class TaskRes(FeatureMethod):
    """Tuned residuals of the class texts."""

    scale: float = hyper(0.5, "weight a of the residual, >= 0 (paper: 0.5; 1 for flowers)", low=0)
    lr: float = hyper(2e-3, "Adam learning rate (official; 2e-4 for ImageNet)", low=0)
    epochs: int | None = hyper(None, "passes over the support set; official: 100 up to 4 shots, 200 for more", low=1)
    batch_size: int = hyper(256, "pictures a step (official)", low=1)
    seed: int = hyper(1, "order of the pictures")

    card = Card(
        key="taskres",
        title="Task Residual for Tuning Vision-Language Models",
        arxiv="2211.10277",
        family="feature-adapter",
        task="few-shot classification",
        trains="text residuals",
        signal="labels",
    )
    search_space = {"scale": (0.1, 0.5, 1.0), "lr": (2e-4, 2e-3)}

    def _fit(self, support: Support, run: Run) -> None:
        images, labels, texts = support.images, support.labels, support.texts
        residual = torch.zeros_like(texts).requires_grad_()  # (C, D)
        few = len(images) <= 4 * len(labels.unique())
        epochs = self.epochs or (100 if few else 200)
        steps = batches(len(images), self.batch_size, epochs=epochs, seed=self.seed)
        per_epoch = len(steps) // epochs

        def loss_of(rows: Tensor) -> Tensor:
            weight = classifier(texts, residual, self.scale)
            return cross_entropy(support.logit_scale * images[rows] @ weight.T, labels[rows])

        def schedule(step: int) -> float:  # by epoch; the first one, at a rate of 1e-5, warms Adam's averages up
            epoch = step // per_epoch
            return 1e-5 / self.lr if epoch == 0 and epochs > 1 else cosine(max(epoch - 1, 0), epochs)

        optimizer = torch.optim.Adam([residual], lr=self.lr, weight_decay=5e-4)
        train(loss_of, optimizer, steps, schedule=schedule, run=run)
        self.weight_ = support.logit_scale * classifier(texts, residual.detach(), self.scale)  # (C, D)

    def _logits(self, images: Tensor) -> Tensor:
        return images @ self.weight_.T  # (N, C)

    @property
    def trained_parameters(self) -> int:
        return self.weight_.numel()
