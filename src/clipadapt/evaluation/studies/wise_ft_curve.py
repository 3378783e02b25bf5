"""The whole line of WiSE-FT in one pass: accuracies on several data sets for every mixing weight alpha.

Nothing is trained. Each image is decoded once, each zero-shot classifier encoded once; per alpha only what differs
is computed: where the image tower is that of the backbone, images are encoded once for all of the line. Every figure
is that of `wise-ft` with this alpha around the same method (Wortsman et al., arXiv 2109.01903). Next to it is the
ensemble of outputs that the paper compares with: logits of the two ends, mixed by the same alpha.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods import Method
from clipadapt.methods.kinds.weights import TOWERS
from clipadapt.methods.robust_fine_tuning.wise_ft import Line
from clipadapt.training.pixels import Pixels

ALPHAS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class WiseFtCurve:
    """Accuracies in [0, 1], by data set, parallel to `alphas`.

    Attributes:
        alphas: 0 is zero-shot, 1 the fitted method.
        weights: of the models with interpolated weights.
        outputs: of the two ends' mixed logits.
    """

    alphas: list[float]
    weights: dict[str, list[float]]
    outputs: dict[str, list[float]]


def output_ensemble(zero_shot: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) zero_shot + alpha tuned, logits (N, C) of two models."""
    return (1 - alpha) * zero_shot + alpha * tuned


def wise_ft_curve(
    model: Method,
    backbone: Backbone,
    data: Mapping[str, Dataset],
    alphas: Sequence[float] = ALPHAS,
    *,
    batch_size: int = 64,
) -> WiseFtCurve:
    """Judge all models between `backbone` and a method that was fitted on it.

    Args:
        model: a weight method, or one that classifies the backbone's features linearly.
        backbone: the one that `model` was fitted on.
        data: data sets by name. One whose classes the model knows is judged among all of the model's; of another, the
            classes are judged among themselves, where the model takes new ones (`Card.new_classes`).
        alphas: mixing weights in [0, 1].
        batch_size: images decoded and encoded at a time.

    Raises:
        ClipadaptError: the model cannot be interpolated, knows other classes, or an argument is out of range.
    """
    alphas = [float(alpha) for alpha in alphas]
    if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise ClipadaptError(f"wise_ft_curve: alphas must be numbers in [0, 1], at least one, not {alphas}.")
    if not data or not all(len(each) for each in data.values()):
        raise ClipadaptError("wise_ft_curve needs at least one data set, and images in each.")
    if (model.origin_ or {}).get("fingerprint") != backbone.fingerprint:
        raise ClipadaptError(f"This {model.card.key} was not fitted on {backbone.source}.")
    line = Line.of(model, backbone)
    # The two ends make the ensemble, and what they share with the asked points is computed once.
    points = sorted({0.0, 1.0, *alphas})
    walker = _Walker(backbone, line)
    weights: dict[str, list[float]] = {}
    outputs: dict[str, list[float]] = {}
    for name, images in data.items():
        labels, heads = _prepare_heads(model, walker, images, points)
        right = dict.fromkeys(alphas, 0)
        mixed = dict.fromkeys(alphas, 0)
        for rows, features in walker.encoded(images, points, batch_size):
            logits = {alpha: features[alpha] @ heads[alpha].T for alpha in points}
            for alpha in right:
                right[alpha] += int((logits[alpha].argmax(1) == labels[rows]).sum())
                ensemble = output_ensemble(logits[0.0], logits[1.0], alpha)
                mixed[alpha] += int((ensemble.argmax(1) == labels[rows]).sum())
        weights[name] = [right[alpha] / len(images) for alpha in alphas]
        outputs[name] = [mixed[alpha] / len(images) for alpha in alphas]
    return WiseFtCurve(alphas, weights, outputs)


def _prepare_heads(
    model: Method, walker: _Walker, data: Dataset, points: Sequence[float]
) -> tuple[Tensor, dict[float, Tensor]]:
    """Labels (N,) and, by point, the classifier (C, D) that they point into."""
    names = list(model.class_names_)
    unknown = [name for name in data.class_names if name not in names]
    if unknown:
        if not model.card.new_classes or walker.line.heads is not None:
            raise unknown_name("class of this model", unknown[0], names)
        names = list(data.class_names)
    places = torch.tensor([names.index(data.class_names[label]) for label in data.labels])
    return places, walker.heads(names, model.templates, points)


class _Walker:
    """One copy of the backbone that takes the weights of any point of the line."""

    def __init__(self, backbone: Backbone, line: Line) -> None:
        self.backbone, self.line = backbone, line
        self.sees = any(not name.startswith(TOWERS["text"]) for name in line.tuned)  # images differently
        self.reads = any(not name.startswith(TOWERS["vision"]) for name in line.tuned)  # texts differently
        self.moving = backbone.copy() if self.sees or self.reads else backbone
        self.state = self.moving.model.state_dict()

    @torch.no_grad()
    def at(self, alpha: float) -> Backbone:
        for name, value in self.line.at(alpha).items():
            self.state[name].copy_(value)
        return self.moving

    def heads(self, names: list[str], templates: Any, points: Sequence[float]) -> dict[float, Tensor]:
        """By point, the classifier (C, D) of `names`."""
        if self.line.heads is not None:
            return {alpha: head for alpha in points if (head := self.line.head(alpha)) is not None}
        scale = self.backbone.logit_scale
        if not self.reads:
            return dict.fromkeys(points, scale * encode_classes(self.backbone, names, templates))
        return {alpha: scale * encode_classes(self.at(alpha), names, templates) for alpha in points}

    def encoded(
        self, data: Dataset, points: Sequence[float], batch_size: int
    ) -> Iterator[tuple[Tensor, dict[float, Tensor]]]:
        """Batches: rows (B,) and, by point, their features (B, D) on the CPU."""
        every = torch.arange(len(data))
        if not self.sees:
            yield every, dict.fromkeys(points, encode_images(self.backbone, data, batch_size=batch_size).features)
            return
        pixels = Pixels(self.backbone, data, min_scale=1.0, seed=0)
        for rows in every.split(batch_size):
            batch = pixels.batch(rows, 0)
            with torch.no_grad():
                yield rows, {alpha: self.at(alpha).encode_images(batch).float().cpu() for alpha in points}
