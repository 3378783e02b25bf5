"""How a method is judged: each protocol is one module of this package, named after its key.

A protocol is a function `run(method, backbone, split, seed, *, options) -> Outcome`: it draws what is learned from,
fits an unfitted method, judges it on the test part, and gives its figures by name. Its keyword-only options are those
that a suite may set; nothing else knows them. Adding one means adding a file here.
"""

from __future__ import annotations

import inspect
import pkgutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.methods import Method, TrainingData
from clipadapt.metrics.calibration import confidences, expected_calibration_error, risk_coverage
from clipadapt.metrics.classification import accuracy, macro_accuracy, per_class
from clipadapt.renamed import old_names


class NotApplicable(ClipadaptError):
    """The method cannot be judged by this protocol on any data: it is skipped, not counted as failed."""


@dataclass(frozen=True)
class Outcome:
    """What a protocol found.

    Attributes:
        figures: what is compared and averaged, by name; shares in [0, 1] unless the name says otherwise.
        model: the fitted method.
        seconds: how long it learned.
        per_class: accuracy of each class that has test images.
        details: anything else a report can show, as JSON values.
    """

    figures: dict[str, float]
    model: Method
    seconds: float
    per_class: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


Protocol = Callable[..., Outcome]
_FOLDER = Path(__file__).parent / "protocols"


def protocols() -> list[str]:
    """The keys of all protocols, sorted."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules([str(_FOLDER)]))


def protocol(key: str) -> Protocol:
    """The protocol's function `run`."""
    if key not in protocols():
        raise unknown_name("protocol", key, protocols())
    return import_module(f"clipadapt.evaluation.protocols.{key.replace('-', '_')}").run


def options(key: str) -> dict[str, Any]:
    """The options of a protocol with their defaults."""
    parameters = inspect.signature(protocol(key)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check(method: Method, backbone: Backbone, data: TrainingData | None = None, **needs: bool) -> None:
    """Raise `NotApplicable` where the method cannot run here; see `Method.why_not`."""
    reason = method.why_not(backbone, data, **needs)
    if reason is not None:
        raise NotApplicable(reason)


def fit(method: Method, backbone: Backbone, support: Dataset | None, **more: Any) -> tuple[Method, float]:
    """The fitted method, and the seconds that it learned; what learns nothing gets the support's class names alone."""
    names = more.get("class_names")
    check(method, backbone, TrainingData.of(support, more.get("val"), more.get("unlabelled"), names, None))
    if method.card.signal == "none" and support is not None:
        more = {"class_names": support.class_names}
        support = None
    start = time.perf_counter()
    model = method.fit(backbone, support, **more)
    return model, time.perf_counter() - start


def judge(model: Method, test: Dataset) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """(figures, per class, details) of a model on labelled images of its own classes, in its own order."""
    return figures_of(model.image_logits(test)[0][:, : len(test.class_names)], test)


def figures_of(logits: Tensor, test: Dataset) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """The same of logits (N, C).

    accuracy   top-1
    macro      mean of the classes' accuracies
    top5       the label is among the five highest; left out with fewer than 10 classes
    ece        expected calibration error, 15 equal-width bins
    aurc       area under the risk-coverage curve: the mean error where the least confident are refused, 0 is best
    """
    labels = np.array(test.labels)
    predicted = logits.argmax(dim=1).numpy()
    confidence, hits = confidences(logits, labels)
    ece, bins = expected_calibration_error(confidence, hits)
    figures = {"accuracy": accuracy(labels, predicted), "macro": macro_accuracy(labels, predicted)}
    if len(test.class_names) >= 10:
        figures["top5"] = float((logits.topk(5).indices.numpy() == labels[:, None]).any(1).mean())
    figures |= {"ece": ece, "aurc": risk_coverage(confidence, hits)[0]}
    classes = {s.name: s.recall for s in per_class(labels, predicted, test.class_names) if s.recall is not None}
    return figures, classes, {"reliability": bins}


__getattr__ = old_names(__name__)
