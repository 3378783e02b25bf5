"""Plain fine-tuning: the whole image tower and a linear head that starts as the zero-shot classifier.

    logits = f(image; theta) h'        theta starts as CLIP's, h as s T; both are trained with cross-entropy

The end-to-end baseline of Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), section 2;
optimiser from the official repository mlfoundations/wise-ft (AdamW, weight decay 0.1, 500 warm-up steps, cosine,
gradient clipping at 1.0, 10 epochs, batch 512 at 3e-5; the authors advise 1e-5 for few shots). Departures: batches of
at most 64 pictures, and a warm-up of a tenth of the run, since few-shot runs are shorter than 500 steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.methods.base import Card, Run, hyper
from clipadapt.methods.registry import register
from clipadapt.methods.tower_method import PixelBatch, TowerMethod, detached, tower_parameters
from clipadapt.training.loop import Loss


@register
@dataclass(kw_only=True)
class FineTune(TowerMethod):
    """All weights of the image tower and the classifier; what WiSE-FT interpolates with the zero-shot model."""

    lr: float = hyper(1e-5, "AdamW learning rate (official advice for few shots)", low=0)
    epochs: int = hyper(10, "passes over the support set (official)", low=1)

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
        tower = tower_parameters(adapted, "vision")
        head = self._text_classifier(backbone).to(backbone.device).requires_grad_()  # (C, D)

        def loss_of(batch: PixelBatch) -> Loss:
            logits = adapted.encode_images(batch.pixels) @ head.T  # (B, C)
            return cross_entropy(logits, batch.labels), logits.argmax(1) == batch.labels

        self._train(backbone, support, [*tower.values(), head], loss_of, run)
        self.tower_, self.weight_ = detached(tower), head.detach().cpu()
        self._restore(backbone)

    @property
    def trained_parameters(self) -> int:
        return super().trained_parameters + self.weight_.numel()
