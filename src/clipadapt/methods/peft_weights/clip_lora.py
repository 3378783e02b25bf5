"""CLIP-LoRA: low-rank updates of the attention projections of both towers.

    W' = W + (alpha / sqrt(r)) B A        A (r, in), B (out, r), B = 0 at the start; all else is frozen

Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models" (arXiv 2405.18541), section 4; settings
from the official repository MaxZanella/CLIP-LoRA (r = 2, alpha = 1, queries, keys and values of every layer of both
towers, dropout 0.25 on the low-rank input, AdamW 2e-4 with weight decay 1e-2, cosine, 500 steps a shot, batch 32,
random resized crops of 8-100 % of the area). Departures: parts of a tower such as "up" follow its depth, where the
official lists are those of 12 blocks for every tower; one template instead of none ("a photo of a {}." is its
default too); the logit scale is the backbone's own, where the official code writes 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.backbones.families import TowerName
from clipadapt.data import Dataset
from clipadapt.errors import unknown_name
from clipadapt.methods.base import Card, Run, WeightMethod, hyper, with_weights
from clipadapt.methods.registry import register
from clipadapt.methods.tower_method import class_encoder
from clipadapt.training.loop import batches, seeded, train
from clipadapt.training.pixels import Pixels
from clipadapt.training.schedules import cosine


def part_of_tower(part: str, depth: int) -> list[int]:
    """Numbers of the blocks of a part: of 12, "bottom" is 0-3, "mid" 4-7, "up" 8-11, "half-up" 6-11, "top3" 9-11."""
    third, two_thirds, half = round(depth / 3), round(2 * depth / 3), depth // 2
    parts = {
        "all": (0, depth),
        "bottom": (0, third),
        "mid": (third, two_thirds),
        "up": (two_thirds, depth),
        "half-bottom": (0, half),
        "half-up": (half, depth),
        **{f"top{n}": (max(depth - n, 0), depth) for n in (1, 2, 3)},
    }
    if part not in parts:
        raise unknown_name("part of a tower", part, parts)
    return list(range(*parts[part]))


def inject(backbone: Backbone, targets: Sequence[str], rank: int, alpha: float, dropout: float) -> dict[str, Tensor]:
    """Put trainable low-rank pairs into the named linear layers of `backbone.model`, in place; the pairs by name.

    "NAME.A" is (r, in) and "NAME.B" is (out, r); the update is scaled by alpha / sqrt(r), the paper's rule.
    """
    from peft import LoraConfig, inject_adapter_in_model  # here, as it takes two seconds to import

    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # any number works
            use_rslora=True,
            lora_dropout=dropout,
            target_modules=list(targets),
        ),
        backbone.model,
    )
    pairs = {}
    for name in targets:
        layer: Any = backbone.model.get_submodule(name)
        layer.lora_dropout.train()  # this dropout only: some towers have others, made for pre-training
        pairs[f"{name}.A"], pairs[f"{name}.B"] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return pairs


def merged(backbone: Backbone, pairs: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights W + scaling * B A by their names in `backbone.model`."""
    state = backbone.model.state_dict()
    return {
        f"{name[:-2]}.weight": state[f"{name[:-2]}.weight"]
        + scaling * (pairs[f"{name[:-2]}.B"] @ a).to(backbone.device)
        for name, a in pairs.items()
        if name.endswith(".A")
    }


@register
@dataclass(kw_only=True)
class ClipLora(WeightMethod):
    """Low-rank adaptation of the towers' attention, merged into the weights after training."""

    rank: int = hyper(2, "rank r >= 1 of each update (paper: 2)", low=1)
    alpha: float = hyper(1.0, "the update is scaled by alpha / sqrt(r) (official)", low=0)
    tower: str = hyper("both", "which tower is adapted", choices=("both", "vision", "text"))
    kinds: Sequence[str] = hyper(("q", "k", "v"), "projections that get an update, of q, k, v, o, fc1, fc2")
    layers: Sequence[int] | str | None = hyper(
        None,
        "blocks that get an update: numbers, negative from the end, or a part of the tower: bottom, mid or up (a third "
        "each), half-bottom, half-up, top1, top2, top3, all (official); all by default",
    )
    dropout: float = hyper(0.25, "dropout on the low-rank input, in [0, 1) (official)", low=0, high=0.99)
    lr: float = hyper(2e-4, "AdamW learning rate (official)", low=0)
    steps_per_shot: int = hyper(500, "training steps for each shot (official)", low=1)
    batch_size: int = hyper(32, "pictures a step (official)", low=1)
    min_scale: float = hyper(0.08, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)
    seed: int = hyper(1, "initial weights, dropout, crops and order of the pictures")

    card = Card(
        key="clip-lora",
        title="Low-Rank Few-Shot Adaptation of Vision-Language Models",
        arxiv="2405.18541",
        family="peft-weights",
        task="few-shot classification",
        trains="low-rank weights",
        signal="labels",
        requires=frozenset({"texts", "weights"}),
        new_classes=True,
    )
    tiny = {"steps_per_shot": 5, "lr": 1e-2, "batch_size": 16, "min_scale": 1.0}

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        adapted = backbone.copy()
        labels = torch.tensor(support.labels, device=backbone.device)
        classifier = class_encoder(adapted, support.class_names, self.templates)
        pixels = Pixels(backbone, support, min_scale=self.min_scale, seed=self.seed)
        total = self.steps_per_shot * max(support.counts)
        per_epoch = -(-len(support) // self.batch_size)
        steps = batches(len(support), self.batch_size, epochs=-(-total // per_epoch), seed=self.seed)[:total]

        def loss_of(step: tuple[int, Tensor]) -> Tensor:
            number, rows = step
            images = adapted.encode_images(pixels.batch(rows, number))  # (B, D)
            texts = classifier() if self.tower != "vision" else frozen
            return cross_entropy(backbone.logit_scale * images @ texts.T, labels[rows])

        with torch.no_grad():
            frozen = classifier()
        with seeded(self.seed):
            targets = self._targets(adapted)
            pairs = inject(adapted, targets, self.rank, self.alpha, self.dropout)
            train(
                loss_of,
                torch.optim.AdamW(list(pairs.values()), lr=self.lr, weight_decay=1e-2),
                list(enumerate(steps)),
                schedule=lambda step: cosine(step, total, floor=1e-6 / self.lr),
                run=run,
            )
        self.lora_ = {name: tensor.detach().cpu() for name, tensor in pairs.items()}
        self._restore(backbone)

    def _targets(self, backbone: Backbone) -> list[str]:
        """Names of the linear layers that get an update; a part of a tower is one of its own depth."""
        towers: tuple[TowerName, ...] = ("text", "vision") if self.tower == "both" else (self.tower,)  # type: ignore[assignment]
        names = []
        for tower in towers:
            layers = self.layers
            if isinstance(layers, str):
                layers = part_of_tower(layers, len(backbone.blocks(tower)))
            names += backbone.target_modules(tower, self.kinds, layers)
        return names

    def _restore(self, backbone: Backbone | None) -> None:
        assert backbone is not None  # a weight method is never fitted on features alone
        self._merged = merged(backbone, self.lora_, self.alpha / self.rank**0.5)
        self.backbone_ = with_weights(backbone, self._merged)
        self.weight_ = self._text_classifier(self.backbone_).cpu()

    def changed(self) -> dict[str, Tensor]:
        return self._merged

    @property
    def trained_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.lora_.values())
