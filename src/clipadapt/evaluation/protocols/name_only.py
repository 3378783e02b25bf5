"""Class names only: nothing labelled; the images of the training part may be looked at without their labels."""

from __future__ import annotations

from typing import Any

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.evaluation.protocol import Outcome, fit, judge
from clipadapt.methods import Method


def run(method: Method, backbone: Backbone, split: Split, seed: int, *, unlabelled: bool = True) -> Outcome:
    """Figures of `judge` on the test part.

    Args:
        unlabelled: give methods that can use them the training images, without labels.
    """
    more: dict[str, Any] = {"unlabelled": split.train} if method.card.unlabelled and unlabelled else {}
    model, seconds = fit(method, backbone, None, class_names=split.test.class_names, **more)
    figures, classes, details = judge(model, split.test)
    return Outcome(figures, model, seconds, classes, details)
