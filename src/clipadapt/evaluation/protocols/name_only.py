"""Class names only: nothing labelled; the pictures of the training part may be looked at without their labels."""

from __future__ import annotations

from typing import Any

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.evaluation.protocol import NotApplicable, Outcome, fit, judged
from clipadapt.methods import Method


def run(method: Method, backbone: Backbone, split: Split, seed: int, *, unlabelled: bool = True) -> Outcome:
    """Figures of `judged` on the test part.

    Args:
        unlabelled: give methods that can use them the training images, without labels.
    """
    card = method.card
    if card.signal != "none" and not (card.unlabelled and unlabelled):
        raise NotApplicable(f"{card.key} learns from {card.signal} pictures, and here are class names only.")
    more: dict[str, Any] = {"unlabelled": split.train} if card.unlabelled and unlabelled else {}
    model, seconds = fit(method, backbone, None, class_names=split.test.class_names, **more)
    figures, classes, details = judged(model, split.test)
    return Outcome(figures, model, seconds, classes, details)
