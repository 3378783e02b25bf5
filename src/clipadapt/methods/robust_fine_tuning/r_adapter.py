"""R-Adapter: linear adapters in frozen towers, made robust by three self-ensembles, and merged into the weights.

    training    h(y) = y + (g / (1 - p)) s F y        g = 0 for an example with probability p: dropping
                F~ <- m F~ + (1 - m) F                after each step, with the factor s: accumulation
    at the end  W' = (I + r s~ F~) W, b' = (I + r s~ F~) b        r in [0, 1]: re-scaling towards zero-shot

y is what the output projection of attention, or the second layer of the MLP, gives in every block of both towers. The
loss is MPM-NCE (`losses.mpm_nce`) between the pictures of a batch and a sentence of the class of each.

Kim et al., "Efficient and Versatile Robust Fine-Tuning of Zero-shot Models" (arXiv 2408.05749). Of the paper only the
abstract could be read; formulas and settings are those of the official repository tjddus9597/R-Adapter-ECCV2024,
defaults those of its base-to-novel runs on eleven data sets with 16 shots: rank 4, s = 0.1 at the start and learned,
no biases, p = 0.2, m = 0.9 without warm-up, r = 0.5, margin 0.1, no smoothing, AdamW 5e-4 without weight decay, batch
32, 100 epochs (101 there), crops of 90-100 % of the area, gradient norm at most 1. For ImageNet it has m = 0.999,
margin 0.05 and smoothing 0.02, 50 epochs with 16 shots; with all pictures 10 epochs and full matrices (`rank=None`,
which are the 13 % of the parameters that the abstract speaks of); for retrieval also r = 0.8 and no smoothing.

Departures: a tenth of the run is warm-up, instead of 500 steps. Sentences come from `templates`, one of the class's
at random for each picture as there, but the default is one template instead of ImageNet's 80. Dropping is by example;
the official code draws along the first axis, which in its towers is the position of a token. The official code takes
a full matrix where the rank is below the width, the low-rank form elsewhere; its merging and its README say otherwise,
and are followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset, class_texts
from clipadapt.losses.contrastive import info_nce
from clipadapt.losses.mpm_nce import mpm_nce
from clipadapt.methods.base import Card, Run, hyper, with_weights
from clipadapt.methods.registry import register
from clipadapt.methods.tower_method import Captions, PixelBatch, TowerMethod
from clipadapt.nn.adapters import Adapters, LinearAdapter, learned, merged, put_back, site_of
from clipadapt.training.loop import Loss, seeded

START_SCALE = 0.1  # of each adapter's learned factor (official)


@register
@dataclass(kw_only=True)
class RAdapter(TowerMethod):
    """Mergeable adapters of both towers, dropped, averaged and re-scaled; learned with MPM-NCE."""

    rank: int | None = hyper(4, "rank of an adapter (official, few shots); None: a full matrix", low=1)
    drop: float = hyper(
        0.2, "probability that an example goes past an adapter in training (official)", low=0, high=0.95
    )
    ema: float = hyper(
        0.9, "what the running mean of the adapters keeps at a step; 0: no mean (official)", low=0, high=1
    )
    scale: float = hyper(0.5, "re-scaling of the adapters at the end; 0 is zero-shot (official)", low=0, high=1)
    margin: float = hyper(0.1, "by which cosines of positives must win (official)", low=0)
    smoothing: float = hyper(0.0, "share of the soft labels that negatives have (official)", low=0, high=0.99)
    loss: str = hyper("mpm-nce", "or InfoNCE, the paper's ablation", choices=("mpm-nce", "info-nce"))
    lr: float = hyper(5e-4, "AdamW learning rate (official)", low=0)
    epochs: int = hyper(100, "passes over the support set (official)", low=1)
    batch_size: int = hyper(32, "pictures a step (official)", low=1)

    card = Card(
        key="r-adapter",
        title="Efficient and Versatile Robust Fine-Tuning of Zero-shot Models",
        arxiv="2408.05749",
        family="robust-fine-tuning",
        task="classification",
        trains="linear adapters in both towers",
        signal="labels",
        requires=frozenset({"texts", "weights"}),
        new_classes=True,
    )
    search_space = {"scale": (0.5, 0.8)}
    tiny = {"rank": 16, "lr": 3e-2, "epochs": 8, "batch_size": 16, "min_scale": 1.0}
    weight_decay: ClassVar[float] = 0.0

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        captions = Captions(backbone, class_texts(support.class_names, self.templates), self.seed)
        with seeded(self.seed):
            adapters = self._adapters(backbone)
            parameters = list(adapters.parameters())
            means = [parameter.detach().clone() for parameter in parameters]

            def loss_of(batch: PixelBatch) -> Loss:
                images = backbone.encode_images(batch.pixels)  # (B, D)
                texts = captions.encode(backbone, batch.labels, batch.number)  # (B, D)
                right = batch.labels[(images @ texts.T).argmax(1)] == batch.labels
                if self.loss == "info-nce":
                    return info_nce(images, texts, backbone.logit_scale), right
                soft = {"margin": self.margin, "smoothing": self.smoothing}
                return mpm_nce(images, texts, batch.labels, backbone.logit_scale, **soft), right

            def accumulate(step: int) -> None:
                for mean, parameter in zip(means, parameters, strict=True):
                    mean.lerp_(parameter.detach(), 1 - self.ema)

            with adapters.attached(backbone.model):
                self._train(backbone, support, parameters, loss_of, run, after_step=accumulate, state=means)
        with torch.no_grad():
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.copy_(mean)
        self.adapters_ = learned(adapters)
        self._restore(backbone)

    def _adapters(self, backbone: Backbone) -> Adapters:
        """New adapters, which draw from torch's global stream."""

        def adapter(site: str) -> LinearAdapter:
            width = site_of(backbone.model, site).out_features
            return LinearAdapter(width, self.rank, scale=START_SCALE, drop=self.drop)

        names = backbone.target_modules(kinds=("o", "fc2"))
        return Adapters({name: adapter(name) for name in names}).to(backbone.device)

    def _restore(self, backbone: Backbone | None) -> None:
        assert backbone is not None  # a weight method is never fitted on features alone
        with seeded(self.seed):  # start values are made and thrown away
            adapters = put_back(self._adapters(backbone), self.adapters_)
        self._merged = merged(backbone.model, adapters, self.scale)
        self.backbone_ = with_weights(backbone, self._merged)
        self.weight_ = self._text_classifier(self.backbone_).cpu()

    def changed(self) -> dict[str, Tensor]:
        return self._merged

    @property
    def trained_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.adapters_.values())
