"""Full fine-tuning with careful settings: both towers, cross-entropy over the class texts, low rates, lower below.

    loss = CE(s x T', y) + pull / 2 |theta - theta_0|^2        x, T by the towers as they are trained; s is frozen
    rate of layer l of L: lr * layer_decay^(L - l)

A recipe, not a paper. Its loss is the cross-entropy baseline ("ce_ablation") of the official repository locuslab/FLYP
(arXiv 2212.00638: AdamW 1e-5, weight decay 0.1). Rates that fall with depth are those of Dong et al., "CLIP Itself is a
Strong Fine-tuner" (2212.06138), and of EVA-CLIP (open_clip #268); the optional pull to the start is L2-SP (Li et al.,
1802.01483). A low rate and towers in evaluation mode are the advice of openai/CLIP #150, interpolation with the start
that of open_clip #282 and #740: wrap this method in `wise-ft`. Ours: the factor 0.8, the token embeddings frozen as
well as the logit scale (most of their rows no class name reads), one rate for both towers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.methods.base import Card, Run, hyper, with_weights
from clipadapt.methods.registry import register
from clipadapt.methods.tower_method import (
    TOWERS,
    PixelBatch,
    TowerMethod,
    class_encoder,
    detached,
    tower_parameters,
)
from clipadapt.training.loop import Loss


def layers_above(backbone: Backbone, name: str) -> int:
    """How many layers lie between a parameter, by its name in `backbone.model`, and the output of its tower.

    0 for what comes behind the blocks (last norm, pooling, projection), then the blocks from last to first, then the
    embeddings.
    """
    tower: Literal["text", "vision"] = "vision" if name.startswith(TOWERS["vision"]) else "text"
    blocks, depth = f"{backbone.tower(tower).blocks}.", len(backbone.blocks(tower))
    if name.startswith(blocks):
        return depth - int(name.removeprefix(blocks).split(".")[0])
    return depth + 1 if "embeddings." in name or "pre_layrnorm" in name else 0


@register
@dataclass(kw_only=True)
class FullFineTune(TowerMethod):
    """Both towers tuned with cross-entropy over class texts, gently: the recipe to start with on your own pictures."""

    tower: str = hyper("both", "which tower is tuned; text prompts stay fixed for vision", choices=("both", "vision"))
    layer_decay: float = hyper(0.8, "factor on the rate for each layer away from the output, in [0, 1]", low=0, high=1)
    pull: float = hyper(0.0, "strength of L2-SP, the pull of all weights to their start; 0 is none", low=0)

    card = Card(
        key="full-fine-tune",
        title="A recipe for fine-tuning CLIP on labelled pictures",
        arxiv=None,
        family="robust-fine-tuning",
        task="classification",
        trains="both towers",
        signal="labels",
        requires=frozenset({"texts", "weights"}),
        new_classes=True,
    )
    search_space = {"lr": (1e-6, 1e-5, 1e-4)}
    tiny = {"lr": 1e-3, "epochs": 8, "batch_size": 16, "min_scale": 1.0}

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        adapted = backbone.copy()
        tower = tower_parameters(adapted, self.tower)
        tokens = f"{backbone.tower('text').tokens}."
        for name in [name for name in tower if name.startswith(tokens)]:
            tower.pop(name).requires_grad_(False)
        texts = class_encoder(adapted, support.class_names, self.templates)
        with torch.no_grad():
            start, frozen = ([p.clone() for p in tower.values()] if self.pull else []), texts()

        def loss_of(batch: PixelBatch) -> Loss:
            rows = texts() if self.tower == "both" else frozen  # (C, D)
            logits = backbone.logit_scale * adapted.encode_images(batch.pixels) @ rows.T  # (B, C)
            loss = cross_entropy(logits, batch.labels)
            for parameter, there in zip(tower.values(), start, strict=bool(self.pull)):
                loss = loss + self.pull / 2 * (parameter - there).square().sum()
            return loss, logits.argmax(1) == batch.labels

        self._train(backbone, support, (), loss_of, run, optimizer=self._optimizer(adapted, tower))
        self.tower_ = detached(tower)
        self.backbone_ = tuned = with_weights(backbone, self.tower_)
        self.weight_ = self._text_classifier(tuned).cpu()

    def _optimizer(self, adapted: Backbone, tower: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        layers: dict[int, list[Tensor]] = {}
        for name, parameter in tower.items():
            layers.setdefault(layers_above(adapted, name), []).append(parameter)
        groups = [{"params": layers[n], "lr": self.lr * self.layer_decay**n} for n in sorted(layers)]
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay)
