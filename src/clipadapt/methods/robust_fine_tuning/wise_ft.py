"""WiSE-FT: the straight line between the zero-shot and the fine-tuned weights; a wrapper around another method.

    theta = (1 - alpha) theta_zero-shot + alpha theta_fine-tuned        for every weight, the classifier included

Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), section 3; the optional Fisher weighting
(`interpolate`) from the official repository mlfoundations/wise-ft. A method whose classifier is encoded by its
adapted text tower (such as CLIP-LoRA) gets it encoded again by the interpolated tower. A method that leaves the towers
alone and classifies by logits = x W' (a linear probe, a learned text prompt) is interpolated in W only, which is the
paper's line for a linear classifier. `evaluation.wise_ft_curve` judges the whole line in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods.base import Card, Method, Run, WeightMethod, hyper, with_weights
from clipadapt.methods.registry import create, register
from clipadapt.methods.robust_fine_tuning.fine_tune import FineTune


def interpolate(
    theta0: Mapping[str, Tensor],
    theta1: Mapping[str, Tensor],
    alpha: float,
    fisher: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    floor: float = 1e-8,
) -> dict[str, Tensor]:
    """(1 - alpha) theta0 + alpha theta1 for every name; both must hold the same names.

    `fisher` weighs each element by the two models' Fisher information, at least `floor` (1 for a name without).
    """
    if theta0.keys() != theta1.keys():
        raise ValueError(f"Only one of the two models has {sorted(theta0.keys() ^ theta1.keys())}")
    if fisher is None:
        return {name: (1 - alpha) * theta0[name] + alpha * theta1[name] for name in theta0}
    out = {}
    for name in theta0:
        f0, f1 = (f[name].clamp(min=floor) if name in f else torch.ones_like(theta0[name]) for f in fisher)
        c0, c1 = (1 - alpha) * f0, alpha * f1
        out[name] = (c0 * theta0[name] + c1 * theta1[name]) / (c0 + c1)
    return out


@dataclass(frozen=True)
class Line:
    """The two ends of the line between a backbone and a method that was fitted on it.

    original, tuned  the weights that differ, by their names in `backbone.model`, at the zero-shot end and at the other
    heads            the two ends' classifiers (C, D); None where the interpolated text tower encodes the classifier
    """

    original: dict[str, Tensor]
    tuned: dict[str, Tensor]
    heads: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, model: Method, backbone: Backbone, pictures: Dataset) -> Line:
        """Some `pictures` show whether a classifier is linear, where the towers are as they were."""
        if isinstance(model, WeightMethod):
            tuned = {name: tensor.cpu() for name, tensor in model.changed().items()}
            state = backbone.model.state_dict()
            original = {name: state[name].cpu() for name in tuned}
            if model.head_from_text:
                return cls(original, tuned, None)
            return cls(original, tuned, (zero_shot_head(model, backbone), model.weight_))
        few = pictures.select(range(min(len(pictures), 256)))
        weight = linear_head(model, encode_images(backbone, few).features)
        if weight is None:
            raise ClipadaptError(
                f"wise-ft interpolates weights, and {model.card.key} changes none of the towers' and has no linear "
                "classifier on their features."
            )
        return cls({}, {}, (zero_shot_head(model, backbone), weight))

    def at(self, alpha: float) -> dict[str, Tensor]:
        """The interpolated weights."""
        return interpolate(self.original, self.tuned, alpha)

    def head(self, alpha: float) -> Tensor | None:
        """The interpolated classifier (C, D), where it is not encoded."""
        if self.heads is None:
            return None
        return interpolate({"head": self.heads[0]}, {"head": self.heads[1]}, alpha)["head"]


def zero_shot_head(model: Method, backbone: Backbone) -> Tensor:
    """The zero-shot classifier (C, D) of a fitted method's classes and templates."""
    return backbone.logit_scale * encode_classes(backbone, model.class_names_, model.templates)


def linear_head(model: Method, images: Tensor) -> Tensor | None:
    """W (C, D) of a fitted method whose logits of the backbone's features x are x W' for all `images` (N, D)."""
    if getattr(model, "reads_pixels", False):  # its features are those of a prompted tower
        return None
    with torch.no_grad():
        weight = model._logits(torch.eye(images.shape[1])).T
        logits = model._logits(images)
    return weight if torch.allclose(logits, images @ weight.T, rtol=1e-3, atol=1e-2) else None


@register
@dataclass(kw_only=True)
class WiseFt(WeightMethod):
    """Any weight method or linear classifier, pulled back towards zero-shot by interpolating all that it changed."""

    method: Any = hyper("fine-tune", "the method to wrap: a key or an unfitted method")
    alpha: float = hyper(0.5, "0 is zero-shot, 1 the wrapped method (paper: 0.5 where nothing is known)", low=0, high=1)

    card = Card(
        key="wise-ft",
        title="Robust fine-tuning of zero-shot models",
        arxiv="2109.01903",
        family="robust-fine-tuning",
        task="classification",
        trains="what the wrapped method trains",
        signal="labels",
        requires=frozenset({"texts", "weights"}),
    )
    tiny = {"method": FineTune(**FineTune.tiny), "alpha": 0.8}

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        keyed = isinstance(self.method, str)
        inner = create(self.method, templates=self.templates) if keyed else replace(self.method)  # never fitted twice
        inner.fit(backbone, support, val=val, report=run.report, resume=run.folder)
        line = Line.of(inner, backbone, support)
        self.tower_ = line.at(self.alpha)
        self.trained_ = inner.trained_parameters
        self.encoded_head_ = line.heads is None
        self.backbone_ = adapted = with_weights(backbone, self.tower_)
        head = line.head(self.alpha)
        self.weight_ = zero_shot_head(inner, adapted) if head is None else head

    @property
    def head_from_text(self) -> bool:  # type: ignore[override]  # known only once fitted
        return self._fitted("encoded_head_")

    def changed(self) -> dict[str, Tensor]:
        return getattr(self, "tower_", {})  # of a head alone there is nothing to keep

    @property
    def trained_parameters(self) -> int:
        return self.trained_
