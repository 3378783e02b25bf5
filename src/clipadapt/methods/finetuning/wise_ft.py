"""WiSE-FT: the straight line between the zero-shot and the fine-tuned weights; a wrapper around a weight method.

    theta = (1 - alpha) theta_zero-shot + alpha theta_fine-tuned        for every weight, the classifier included

Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), section 3; the optional Fisher weighting
(`interpolate`) from the official repository mlfoundations/wise-ft. A method whose classifier is encoded by its
adapted text tower (such as CLIP-LoRA) gets it encoded again by the interpolated tower.
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
from clipadapt.methods.base import Card, Run, WeightMethod, hyper, with_weights
from clipadapt.methods.finetuning.fine_tune import FineTune
from clipadapt.methods.registry import create, register


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


@register
@dataclass(kw_only=True)
class WiseFt(WeightMethod):
    """Any weight method, pulled back towards zero-shot by interpolating all that it changed."""

    method: Any = hyper("fine-tune", "the weight method to wrap: a key or an unfitted method")
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
        if not isinstance(inner, WeightMethod):
            raise ClipadaptError(f"wise-ft interpolates weights, and {inner.card.key} changes none.")
        inner.fit(backbone, support, val=val, report=run.report, resume=run.folder)
        tuned = inner.changed()
        original = {name: backbone.model.state_dict()[name] for name in tuned}
        self.tower_ = {k: v.cpu() for k, v in interpolate(original, tuned, self.alpha).items()}
        self.trained_ = inner.trained_parameters
        self.backbone_ = adapted = with_weights(backbone, self.tower_)
        if inner.head_from_text:
            self.weight_ = self._text_classifier(adapted).cpu()
        else:
            head0 = self._text_classifier(backbone).cpu()
            self.weight_ = interpolate({"head": head0}, {"head": inner.weight_}, self.alpha)["head"]

    @property
    def trained_parameters(self) -> int:
        return self.trained_
