"""CLIPood: the image tower learns against fixed class texts with margins, and is averaged along its whole way.

    loss    = CE(s (x T' + margin (1 - T_y T')), y)        classes whose texts differ more must be told apart by more
    weights = sum_t a_t theta_t / sum_t a_t                a_t: density of Beta(beta, beta) over the run, t = 0 is CLIP

Shu et al., "CLIPood: Generalizing CLIP to Out-of-Distributions" (arXiv 2302.00864). Of the paper only the abstract was
at hand; details are those of the official repository thuml/CLIPood: margin 0.3, beta 0.5 for domain shift and 0.1 for
open classes with 16 shots, AdamW 5e-6 (1e-5 on larger sets) with weight decay 0.1, cosine without warm-up, batch 36,
CLIP's own logit scale, towers in evaluation mode, crops of 70-100 % of the area. It subtracts margin T_y from x, which
makes the same softmax. Departures: epochs are passes over the support set (official: 500 to 10,000 steps, with 16
shots mostly 20 to 60 passes), and a batch is drawn from all domains together (official: evenly from each).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.features import encode_classes
from clipadapt.methods.base import Card, Run, hyper, with_weights
from clipadapt.methods.registry import register
from clipadapt.methods.tower_method import PixelBatch, TowerMethod, detached, tower_parameters
from clipadapt.training.averaging import BetaAverage
from clipadapt.training.loop import Loss


def margin_logits(images: Tensor, texts: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Cosines (B, C) of unit images (B, D) and texts (C, D), raised by margin times the label's text distance."""
    return images @ texts.T + margin * (1 - texts[labels] @ texts.T)


@register
@dataclass(kw_only=True)
class Clipood(TowerMethod):
    """Image tower tuned by margin metric softmax, then averaged from zero-shot to the end by Beta weights."""

    lr: float = hyper(5e-6, "AdamW learning rate (official; 1e-5 on larger sets)", low=0)
    epochs: int = hyper(20, "passes over the support set", low=1)
    batch_size: int = hyper(36, "pictures a step (official)", low=1)
    min_scale: float = hyper(0.7, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)
    margin: float = hyper(0.3, "lambda, per unit of text distance (official); 0 is plain cross-entropy", low=0)
    beta: float | None = hyper(0.5, "of the average (official; 0.1 for open classes); None: no average", low=0.01)

    card = Card(
        key="clipood",
        title="CLIPood: Generalizing CLIP to Out-of-Distributions",
        arxiv="2302.00864",
        family="robust-fine-tuning",
        task="classification under domain shift and with open classes",
        trains="image tower",
        signal="labels",
        requires=frozenset({"texts", "weights"}),
        new_classes=True,
    )
    tiny = {"lr": 3e-4, "epochs": 8, "batch_size": 16, "min_scale": 1.0}
    clip_norm = None
    warmup = 0.0

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        adapted = backbone.copy()
        tower = tower_parameters(adapted, "vision")
        texts = encode_classes(backbone, support.class_names, self.templates).to(backbone.device)  # (C, D)

        def loss_of(batch: PixelBatch) -> Loss:
            images = adapted.encode_images(batch.pixels)  # (B, D)
            logits = backbone.logit_scale * margin_logits(images, texts, batch.labels, self.margin)
            with torch.no_grad():
                hits = (images @ texts.T).argmax(1) == batch.labels
            return cross_entropy(logits, batch.labels), hits

        if self.beta is None:
            self._train(backbone, support, tower.values(), loss_of, run)
            self.tower_ = detached(tower)
        else:
            steps = self.epochs * -(-len(support) // self.batch_size)
            average = BetaAverage(tower.values(), self.beta, steps)
            self._train(
                backbone,
                support,
                tower.values(),
                loss_of,
                run,
                after_step=lambda number: average.update(number + 1),
                state=average.averages,
            )
            self.tower_ = {n: a.cpu() for n, a in zip(tower, average.averages, strict=True)}
        self.backbone_ = tuned = with_weights(backbone, self.tower_)
        self.weight_ = self._text_classifier(tuned).cpu()
