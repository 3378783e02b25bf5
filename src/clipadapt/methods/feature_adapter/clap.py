"""CLAP: a linear probe that starts at the class texts and is held to each of them as far as zero-shot can be trusted.

    logits = s x unit(w)'        min over w of CE + mean_c lambda_c |w_c - t_c|^2,   w starts at t
    lambda_c = mean zero-shot probability of class c on its own pictures;   no penalty at all: ZS-LP

Silva-Rodriguez et al., "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models"
(arXiv 2312.12730). From the official repository jusiro/CLAP: the mean over classes, w not normalised in the penalty,
multipliers that stay as they start (its published commands never update them), SGD 0.1 with momentum 0.9 over 300
epochs in batches of 256, a first epoch at 1e-5, then half a cosine. Departures: a class without a picture gets the
mean multiplier; and one plain view instead of 20 augmented ones. With few plain views the published rate is too high:
CLAP's training is chaotic (after some 40 steps rounding decides where it goes) and may end below zero-shot. A rate of
1e-3, which the automatic selection tries too, mends that: leave-one-out in sets of 2 and 4 shots prefers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipadapt.methods.base import Card, FeatureMethod, Run, Support, hyper
from clipadapt.methods.registry import register
from clipadapt.training.loop import UNWATCHED, batches, train
from clipadapt.training.schedules import cosine

FIRST_LR = 1e-5


def multipliers(zero_shot: Tensor, labels: Tensor) -> Tensor:
    """Per class (C,), the mean probability that zero-shot logits (N, C) give to its own pictures."""
    own = zero_shot.softmax(1).gather(1, labels[:, None])[:, 0]  # (N,)
    counts = torch.bincount(labels, minlength=zero_shot.shape[1])  # (C,)
    means = torch.zeros_like(zero_shot[0]).index_add_(0, labels, own) / counts.clamp(min=1)
    means[counts == 0] = means[counts > 0].mean()
    return means


def rate(epoch: int, epochs: int, lr: float) -> float:
    """Factor on `lr` in an epoch: 1e-5 / lr in the first one, then half a cosine that would end one epoch later."""
    return FIRST_LR / lr if epoch == 0 else cosine(epoch - 1, epochs)


def train_prototypes(
    images: Tensor,
    labels: Tensor,
    texts: Tensor,
    steps: list[Tensor],
    *,
    logit_scale: float,
    lr: float,
    schedule: Callable[[int], float],
    penalty: Tensor | None = None,
    run: Run = UNWATCHED,
) -> Tensor:
    """Prototypes (C, D), not normalised, trained from text features (C, D) on rows of images (N, D), labels (N,).

    `penalty` (C,) holds the multipliers of the squared distances to the texts; None is ZS-LP.
    """
    prototypes = texts.clone().requires_grad_()

    def loss_of(rows: Tensor) -> Tensor:
        loss = cross_entropy(logit_scale * images[rows] @ normalize(prototypes, dim=1).T, labels[rows])
        if penalty is not None:
            loss = loss + (penalty * (prototypes - texts).square().sum(1)).mean()
        return loss

    train(loss_of, torch.optim.SGD([prototypes], lr=lr, momentum=0.9), steps, schedule=schedule, run=run)
    return prototypes.detach()


@register
@dataclass(kw_only=True)
class Clap(FeatureMethod):
    """A zero-shot initialised linear probe, held to its texts by class-adaptive penalties."""

    constraint: str = hyper("class", '"class": adaptive penalties; "none": plain ZS-LP', choices=("class", "none"))
    lr: float = hyper(0.1, "SGD learning rate (paper, for augmented views; 1e-3 suits plain ones)", low=FIRST_LR)
    epochs: int = hyper(300, "passes over the support set (paper)", low=1)
    batch_size: int = hyper(256, "pictures a step (paper)", low=1)
    seed: int = hyper(1, "order of the pictures")

    card = Card(
        key="clap",
        title="A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models",
        arxiv="2312.12730",
        family="feature-adapter",
        task="few-shot classification",
        trains="linear head",
        signal="labels",
    )
    search_space = {"lr": (0.1, 0.01, 0.001), "constraint": ("class", "none")}

    def _fit(self, support: Support, run: Run) -> None:
        steps = batches(len(support.images), self.batch_size, epochs=self.epochs, seed=self.seed)
        per_epoch = len(steps) // self.epochs
        prototypes = train_prototypes(
            support.images,
            support.labels,
            support.texts,
            steps,
            logit_scale=support.logit_scale,
            lr=self.lr,
            schedule=lambda step: rate(step // per_epoch, self.epochs, self.lr),
            penalty=multipliers(support.zero_shot, support.labels) if self.constraint == "class" else None,
            run=run,
        )
        self.weight_ = support.logit_scale * normalize(prototypes, dim=1)  # (C, D)

    def _logits(self, images: Tensor) -> Tensor:
        return images @ self.weight_.T  # (N, C)

    @property
    def trained_parameters(self) -> int:
        return self.weight_.numel()
