"""WiSE-FT: the straight line between the zero-shot and the fine-tuned weights; a wrapper around another method.

    theta = (1 - alpha) theta_zero-shot + alpha theta_fine-tuned        for every weight, the classifier included

Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), section 3; the optional Fisher weighting
(`interpolate`) from the official repository mlfoundations/wise-ft. A method whose classifier is encoded by its
adapted text tower (such as CLIP-LoRA) gets it encoded again by the interpolated tower. A method that leaves the towers
alone and classifies by logits = x W' (a linear probe, a learned text prompt) is interpolated in W only, which is the
paper's line for a linear classifier. `evaluation.studies.wise_ft_curve` judges the whole line in one pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes
from clipadapt.methods import Classifier, Run, TrainingData, WeightMethod, hyper, method
from clipadapt.methods.kinds.wrapper import unfitted


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

    Attributes:
        original, tuned: the weights that differ, by their names in `backbone.model`, at the zero-shot end and at the
            other.
        heads: the two ends' classifiers (C, D); None where the interpolated text tower encodes the classifier.
    """

    original: dict[str, Tensor]
    tuned: dict[str, Tensor]
    heads: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, model: Any, backbone: Backbone) -> "Line":
        """Of a method that changes weights, or of one whose classifier is linear on the backbone's own features."""
        if model.kind == "weights":
            tuned = {name: tensor.cpu() for name, tensor in model.changed().items()}
            state = backbone.weights()
            original = {name: state[name].cpu() for name in tuned}
            heads = None if model.head_from_text else (zero_shot_head(model, backbone), model.weight_)
            return cls(original, tuned, heads)
        head = model.head
        plain = head is not None and head.weight is not None and (head.bias is None or not head.bias.any())
        if not plain or model.encoder.fingerprint != backbone.fingerprint:
            raise ClipadaptError(
                f"wise-ft interpolates weights, and {model.card.key} changes none of the towers' and has no linear "
                "classifier on their features."
            )
        return cls({}, {}, (zero_shot_head(model, backbone), head.weight))

    def at(self, alpha: float) -> dict[str, Tensor]:
        """The interpolated weights."""
        return interpolate(self.original, self.tuned, alpha)

    def head(self, alpha: float) -> Tensor | None:
        """The interpolated classifier (C, D), where it is not encoded."""
        if self.heads is None:
            return None
        return interpolate({"head": self.heads[0]}, {"head": self.heads[1]}, alpha)["head"]


def zero_shot_head(model: Any, backbone: Backbone) -> Tensor:
    """The zero-shot classifier (C, D) of a fitted method's classes and templates."""
    return backbone.logit_scale * encode_classes(backbone, model.class_names_, model.templates)


@method(
    "wise-ft",
    title="Robust fine-tuning of zero-shot models",
    arxiv="2109.01903",
    problem="classification",
    trains="what the wrapped method trains",
)
class WiseFt(WeightMethod, Classifier):
    """Any weight method or linear classifier, pulled back towards zero-shot by interpolating all that it changed.

    >>> model = create("wise-ft", method="fine-tune", alpha=0.5).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    method: Any = hyper("fine-tune", "the method to wrap: a key or an unfitted method")
    alpha: float = hyper(0.5, "0 is zero-shot, 1 the wrapped method (paper: 0.5 where nothing is known)", low=0, high=1)

    def _learn(self, model: Backbone, data: TrainingData, run: Run) -> None:
        inner = unfitted(self)
        inner.fit(model, data.support, val=data.val, report=run.report, resume=run.folder)
        line = Line.of(inner, model)
        self.update_, self.encoded_head_ = line.at(self.alpha), line.heads is None
        run.trained = inner.trained_parameters
        self._merge(model)
        head = line.head(self.alpha)
        self.weight_ = zero_shot_head(inner, self.backbone_) if head is None else head

    @property
    def head_from_text(self) -> bool:  # known only once fitted
        return self._fitted("encoded_head_")
