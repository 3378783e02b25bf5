"""Plain fine-tuning: the whole image tower and a linear head that starts as the zero-shot classifier.

    logits = f(image; theta) h'        theta starts as CLIP's, h as s T; both are trained with cross-entropy

The end-to-end baseline of Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), section 2;
optimiser from the official repository mlfoundations/wise-ft (AdamW, weight decay 0.1, 500 warm-up steps, cosine,
gradient clipping at 1.0, 10 epochs, batch 512 at 3e-5; the authors advise 1e-5 for few shots). Departures: batches of
at most 64 pictures, and a warm-up of a tenth of the run, since few-shot runs are shorter than 500 steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.methods.base import Card, Run, WeightMethod, hyper
from clipadapt.methods.registry import register
from clipadapt.training.loop import batches, train
from clipadapt.training.pixels import Pixels
from clipadapt.training.schedules import cosine


def image_tower(backbone: Backbone) -> dict[str, torch.nn.Parameter]:
    """The parameters of the image tower and its projection, by their names in `backbone.model`."""
    return {n: p for n, p in backbone.model.named_parameters() if n.startswith(("vision_model.", "visual_projection."))}


@register
@dataclass(kw_only=True)
class FineTune(WeightMethod):
    """All weights of the image tower and the classifier; what WiSE-FT interpolates with the zero-shot model."""

    lr: float = hyper(1e-5, "AdamW learning rate (official advice for few shots)", low=0)
    epochs: int = hyper(10, "passes over the support set (official)", low=1)
    batch_size: int = hyper(64, "pictures a step", low=1)
    min_scale: float = hyper(0.9, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)
    seed: int = hyper(1, "crops and order of the pictures")

    card = Card(
        key="fine-tune",
        title="Robust fine-tuning of zero-shot models",
        arxiv="2109.01903",
        family="robust-fine-tuning",
        task="classification",
        trains="image tower and linear head",
        signal="labels",
        requires=frozenset({"texts", "weights"}),
    )
    tiny = {"lr": 3e-4, "epochs": 5, "batch_size": 16, "min_scale": 1.0}
    head_from_text = False

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        adapted = backbone.copy()
        labels = torch.tensor(support.labels, device=backbone.device)
        tower = image_tower(adapted)
        head = self._text_classifier(backbone).to(backbone.device).requires_grad_()  # (C, D)
        for parameter in tower.values():
            parameter.requires_grad_()
        trained = [*tower.values(), head]
        pixels = Pixels(backbone, support, min_scale=self.min_scale, seed=self.seed)
        steps = batches(len(support), self.batch_size, epochs=self.epochs, seed=self.seed)

        def loss_of(step: tuple[int, Tensor]) -> Tensor:
            number, rows = step
            images = adapted.encode_images(pixels.batch(rows, number))  # (B, D)
            return cross_entropy(images @ head.T, labels[rows])

        warmup = len(steps) // 10
        train(
            loss_of,
            torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.1),
            list(enumerate(steps)),
            schedule=lambda step: cosine(step, len(steps), warmup),
            clip_norm=1.0,
            run=run,
        )
        self.tower_ = {name: parameter.detach().cpu() for name, parameter in tower.items()}
        self.weight_ = head.detach().cpu()
        self._restore(backbone)

    @property
    def trained_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tower_.values()) + self.weight_.numel()
