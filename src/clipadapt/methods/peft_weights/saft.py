"""SAFT: fine-tune only the few weights on which the task's loss depends most, and leave all others as they are.

    g = gradient of the loss over the whole support set;  m = 1 where |g| is among the top share (0.1 %), else 0
    theta <- theta - rate * m * update        the mask m is chosen once, at the pre-trained weights

Nguyen et al., "SAFT: Towards Out-of-Distribution Generalization in Fine-Tuning" (arXiv 2407.03036). There is no
official code, and of the paper only the abstract was at hand: it gives the rule, the share, and that all else is
frozen. Ours are the loss (cross-entropy over the class texts, logit scale frozen), that the mask is chosen from both
towers together on plain pictures, AdamW without weight decay, the rate and the length. Only the chosen values are
parameters: the optimiser holds nothing else, and they are put into the weights for each forward pass, which is the same
as masking gradients. Saved are these values and their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.methods.base import Card, Run, hyper, with_weights
from clipadapt.methods.registry import register
from clipadapt.methods.tower_method import PixelBatch, TowerMethod, class_encoder, tower_parameters
from clipadapt.training.loop import Loss
from clipadapt.training.pixels import Pixels


def chosen(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The places of the `count` highest scores of all tensors together: for each name, flat indices, ascending.

    Names without a place are left out.
    """
    best = torch.cat([score.flatten() for score in scores.values()]).topk(count).indices.sort().values  # (count,)
    places, start = {}, 0
    for name, score in scores.items():
        inside = best[(best >= start) & (best < start + score.numel())]
        if len(inside):
            places[name] = inside - start
        start += score.numel()
    return places


def put_in(
    weights: Mapping[str, Tensor], places: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights named in `places` with `values` at these flat indices; gradients flow to the values."""
    return {
        name: weights[name].flatten().index_put((where,), values[name]).view_as(weights[name])
        for name, where in places.items()
    }


class _Logits(nn.Module):
    """Makes `logits` a forward pass of the backbone's model, so that weights can be replaced for its duration."""

    def __init__(self, model: nn.Module, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._logits = model, logits

    def forward(self, pixels: Tensor) -> Tensor:
        return self._logits(pixels)


@register
@dataclass(kw_only=True)
class Saft(TowerMethod):
    """Sparse fine-tuning: a binary mask, chosen once by the gradient's magnitude, says which weights may move."""

    share: float = hyper(0.001, "share of the weights that are trained, in (0, 1] (paper: 0.1 %)", low=1e-9, high=1)
    mask: str = hyper("gradient", "how they are chosen; random is the paper's ablation", choices=("gradient", "random"))
    tower: str = hyper("both", "which tower's weights they are chosen from", choices=("both", "vision", "text"))
    lr: float = hyper(1e-4, "AdamW learning rate (the paper's is not known)", low=0)

    card = Card(
        key="saft",
        title="SAFT: Towards Out-of-Distribution Generalization in Fine-Tuning",
        arxiv="2407.03036",
        family="peft-weights",
        task="classification under distribution shift",
        trains="0.1 % of the weights",
        signal="labels",
        requires=frozenset({"texts", "weights"}),
        new_classes=True,
    )
    search_space = {"lr": (1e-5, 1e-4, 1e-3)}
    tiny = {"share": 0.01, "lr": 3e-3, "epochs": 8, "batch_size": 16, "min_scale": 1.0}
    weight_decay = 0.0

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        adapted = backbone.copy()
        tower = tower_parameters(adapted, self.tower)
        texts = class_encoder(adapted, support.class_names, self.templates)
        model = _Logits(adapted.model, lambda pixels: adapted.logit_scale * adapted.encode_images(pixels) @ texts().T)
        scores = self._scores(tower, model, Pixels(backbone, support, min_scale=1.0, seed=0), support.labels)
        places = chosen(scores, max(1, round(self.share * sum(p.numel() for p in tower.values()))))
        adapted.model.requires_grad_(False)
        values = {name: tower[name].flatten()[where].requires_grad_() for name, where in places.items()}

        def loss_of(batch: PixelBatch) -> Loss:
            weights = {f"model.{name}": weight for name, weight in put_in(tower, places, values).items()}
            logits = functional_call(model, weights, (batch.pixels,))  # (B, C)
            return cross_entropy(logits, batch.labels), logits.argmax(1) == batch.labels

        self._train(backbone, support, values.values(), loss_of, run)
        self.places_ = {name: where.int().cpu() for name, where in places.items()}
        self.values_ = {name: value.detach().cpu() for name, value in values.items()}
        self._restore(backbone)

    def _scores(
        self, tower: dict[str, Parameter], model: nn.Module, pixels: Pixels, labels: Sequence[int]
    ) -> dict[str, Tensor]:
        """What the mask is chosen by: |gradient| of the mean loss over the plain pictures, or random numbers."""
        if self.mask == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return {name: torch.rand(p.shape, generator=generator).to(p.device) for name, p in tower.items()}
        for rows in torch.arange(len(labels)).split(self.batch_size):
            logits = model(pixels.batch(rows, 0))  # (B, C)
            target = torch.tensor([labels[row] for row in rows.tolist()], device=logits.device)
            (cross_entropy(logits, target, reduction="sum") / len(labels)).backward()
        scores = {name: torch.zeros_like(p) if p.grad is None else p.grad.abs() for name, p in tower.items()}
        for parameter in tower.values():
            parameter.grad = None
        return scores

    def _restore(self, backbone: Backbone | None) -> None:
        assert backbone is not None  # a weight method is never fitted on features alone
        weights = {name: p.detach() for name, p in backbone.model.named_parameters() if name in self.places_}
        places = {name: where.to(backbone.device).long() for name, where in self.places_.items()}
        values = {name: value.to(backbone.device) for name, value in self.values_.items()}
        self._changed = put_in(weights, places, values)
        self.backbone_ = with_weights(backbone, self._changed)
        self.weight_ = self._text_classifier(self.backbone_).cpu()

    def changed(self) -> dict[str, Tensor]:
        return self._changed

    @property
    def trained_parameters(self) -> int:
        return sum(value.numel() for value in self.values_.values())
