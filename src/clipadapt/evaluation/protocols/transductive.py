"""Transduction: the images to be judged on are given, without labels, while the method learns.

`shots` labelled images of each class may be given in addition, 0 for none. Methods that cannot learn from unlabelled
images are judged as they are with the same labelled ones, so that the table shows what transduction adds.
"""

from __future__ import annotations

from typing import Any

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.evaluation.protocol import Outcome, fit, judge
from clipadapt.methods import Method


def run(method: Method, backbone: Backbone, split: Split, seed: int, *, shots: int = 0) -> Outcome:
    """Figures of `judge` on the test part.

    Args:
        shots: labelled images of each class to learn from as well; 0 for none.
    """
    support = split.train.few_shot(shots, seed=seed) if shots and method.card.signal != "none" else None
    more: dict[str, Any] = {"class_names": split.test.class_names} if support is None else {}
    if method.card.unlabelled:
        more["unlabelled"] = split.test
    model, seconds = fit(method, backbone, support, **more)
    figures, classes, details = judge(model, split.test)
    return Outcome(figures, model, seconds, classes, details)
