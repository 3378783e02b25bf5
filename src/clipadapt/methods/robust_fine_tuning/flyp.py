"""FLYP: fine-tune as CLIP was pre-trained, with the contrastive loss between pictures and captions of their classes.

    loss = (CE(s I T', 1..B) + CE(s T I', 1..B)) / 2        T_i is the text of a caption of picture i's class

Both towers and the logit scale are trained; the classifier is what the trained text tower makes of the class names.

Goyal et al., "Finetune like you pretrain: Improved finetuning of zero-shot vision models" (arXiv 2212.00638). The text
of the paper was not at hand; details are those of the official repository locuslab/FLYP: a template is drawn for each
picture, captions of one class in a batch count as each other's negatives, AdamW 1e-5 with weight decay 0.1 on all
parameters, cosine, no gradient clipping, no warm-up for few shots (500 steps elsewhere; its issue #13), 10 epochs on
ImageNet and 20 for few shots, crops of 90-100 % of the area. Its loss function also has a form that is told the labels
(`ground_labels`), in which captions of one class share the target. Departure: batches of at most 64 pictures (official:
512, and 256 for few shots).
"""

from __future__ import annotations

from dataclasses import dataclass

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset, class_texts
from clipadapt.losses.contrastive import info_nce
from clipadapt.losses.mpm_nce import mpm_nce
from clipadapt.methods.base import Card, Run, hyper, with_weights
from clipadapt.methods.registry import register
from clipadapt.methods.tower_method import Captions, PixelBatch, TowerMethod, detached, tower_parameters
from clipadapt.training.loop import Loss


@register
@dataclass(kw_only=True)
class Flyp(TowerMethod):
    """Contrastive fine-tuning of both towers with captions of the classes, as in pre-training."""

    epochs: int = hyper(20, "passes over the support set (official, few shots)", low=1)
    ground_labels: bool = hyper(False, "captions of one class share the target, instead of being negatives (official)")

    card = Card(
        key="flyp",
        title="Finetune like you pretrain: Improved finetuning of zero-shot vision models",
        arxiv="2212.00638",
        family="robust-fine-tuning",
        task="classification",
        trains="both towers and the logit scale",
        signal="labels",
        requires=frozenset({"texts", "weights"}),
        new_classes=True,
    )
    search_space = {"lr": (1e-6, 1e-5, 1e-4)}
    tiny = {"lr": 3e-4, "epochs": 8, "batch_size": 16, "min_scale": 1.0}
    clip_norm = None
    warmup = 0.0

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        adapted = backbone.copy()
        tower = tower_parameters(adapted, "both")
        tower["logit_scale"] = adapted.model.logit_scale.requires_grad_()
        captions = Captions(adapted, class_texts(support.class_names, self.templates), self.seed)

        def loss_of(batch: PixelBatch) -> Loss:
            images = adapted.encode_images(batch.pixels)  # (B, D)
            texts = captions.encode(adapted, batch.labels, batch.number)  # (B, D)
            right = batch.labels[(images @ texts.T).argmax(1)] == batch.labels
            scale = adapted.model.logit_scale.exp()
            if self.ground_labels:
                return mpm_nce(images, texts, batch.labels, scale), right
            return info_nce(images, texts, scale), right

        self._train(backbone, support, tower.values(), loss_of, run)
        self.tower_ = detached(tower)
        self.backbone_ = tuned = with_weights(backbone, self.tower_)
        self.weight_ = self._text_classifier(tuned).cpu()
