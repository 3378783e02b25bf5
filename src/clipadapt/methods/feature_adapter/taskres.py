"""TaskRes: a residual of its own for each class text, free of what the texts themselves know.

    min over R of  CE(s S unit(T + a R)', y)        R (C, D) starts at zero; S = support features

Yu et al., "Task Residual for Tuning Vision-Language Models" (arXiv 2211.10277), section 3.2; optimiser and schedule
from the official repository geekyutao/TaskRes (a = 0.5; Adam 2e-3 with weight decay 5e-4 in the gradient, batch 256,
cosine by epoch after one epoch at 1e-5; 100 epochs up to 4 shots, 200 for more).

Departures: T are unit vectors here, the official code adds R to texts of their original length, next to which the same
step is smaller; features are encoded once, without augmentation; the "enhanced base" (a text projection tuned
beforehand) is not offered.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipadapt.methods import Classifier, FeatureMethod, Run, Support, hyper, method
from clipadapt.training.schedules import cosine_by_epoch


def classifier(texts: Tensor, residual: Tensor, scale: float) -> Tensor:
    """Unit class weights (C, D) from texts (C, D) and their residuals (C, D)."""
    return normalize(texts + scale * residual, dim=1)


@method(
    "taskres",
    title="Task Residual for Tuning Vision-Language Models",
    arxiv="2211.10277",
    trains="text residuals",
)
class TaskRes(FeatureMethod, Classifier):
    """Tuned residuals of the class texts.

    >>> model = create("taskres", epochs=2).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    scale: float = hyper(0.5, "weight a of the residual, >= 0 (paper: 0.5; 1 for flowers)", low=0)
    lr: float = hyper(2e-3, "Adam learning rate (official; 2e-4 for ImageNet)", low=0)
    epochs: int | None = hyper(None, "passes over the support set; official: 100 up to 4 shots, 200 for more", low=1)
    batch_size: int = hyper(256, "images a step (official)", low=1)
    seed: int = hyper(1, "order of the images")

    search_space = {"scale": (0.1, 0.5, 1.0), "lr": (2e-4, 2e-3)}

    def _fit(self, support: Support, run: Run) -> None:
        residual = torch.zeros_like(support.texts).requires_grad_()  # (C, D)
        few = len(support.images) <= 4 * len(support.labels.unique())

        def loss_of(rows: Tensor) -> Tensor:
            weight = classifier(support.texts, residual, self.scale)
            return cross_entropy(support.logit_scale * support.images[rows] @ weight.T, support.labels[rows])

        self._descend(
            loss_of,
            torch.optim.Adam([residual], lr=self.lr, weight_decay=5e-4),
            support,
            run,
            # the first epoch, at a rate of 1e-5, warms Adam's averages up
            schedule=lambda step, plan: cosine_by_epoch(step, plan.per_epoch, plan.epochs, first=1e-5 / self.lr),
            epochs=self.epochs or (100 if few else 200),
        )
        self.weight_ = support.logit_scale * classifier(support.texts, residual.detach(), self.scale)  # (C, D)
