"""Common corruptions: learn from clean images, be judged on clean ones and on the same ones corrupted.

Kinds and severities are those of ImageNet-C (arXiv 1903.12261; see `data.corruptions`). Images larger than what the
model sees are shrunk to that size first, so that it sees the published strength. "corrupted" is the mean accuracy over
kinds and severities, every one counting the same; the published mCE, which relates errors to those of AlexNet, is not
given. `kinds` are "all", names of groups (noise, blur, weather, digital) or kinds; in a suite, a list of lists, since
a list makes separate cells. `limit`: at most this many test images per class, the same for every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.data.corruptions.kinds import SEVERITIES, corrupted, kinds_of
from clipadapt.data.items import FeatureItem
from clipadapt.evaluation.protocol import NotApplicable, Outcome, fit, judge
from clipadapt.methods import Method


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    shots: int = 16,
    kinds: str | Sequence[str] = "all",
    severities: int | Sequence[int] = SEVERITIES,
    limit: int | None = None,
) -> Outcome:
    """Figures of `judge` on the clean test images, and "corrupted": the mean accuracy over kinds and severities.

    Args:
        shots: images of each class to learn from, as they are.
        kinds: "all", names of groups (noise, blur, weather, digital) or of kinds; in a suite, a list of lists.
        severities: from 1 to 5; in a suite, a list of lists.
        limit: at most this many test images of each class, the same for every seed; None for all.
    """
    wanted = kinds_of(kinds)
    levels = [severities] if isinstance(severities, int) else list(severities)
    test = split.test if limit is None else split.test.few_shot(limit, seed=1)
    if any(isinstance(item, FeatureItem) for item in test.items):
        raise NotApplicable(f"{test.name} is features without pixels, so they cannot be corrupted.")
    plan = {
        (kind, level): corrupted(test, kind, level, seed=1, size=min(backbone.image_size))
        for kind in wanted
        for level in levels
    }
    model, seconds = fit(method, backbone, split.train.few_shot(shots, seed=seed))
    figures, classes, details = judge(model, test)
    labels = np.array(test.labels)
    found = {
        place: float((model.image_logits(data)[0].argmax(1).numpy() == labels).mean()) for place, data in plan.items()
    }
    figures["corrupted"] = fmean(found.values())
    details |= {
        "by_kind": {kind: fmean(found[kind, level] for level in levels) for kind in wanted},
        "by_severity": {str(level): fmean(found[kind, level] for kind in wanted) for level in levels},
        "corruptions": {kind: {str(level): found[kind, level] for level in levels} for kind in wanted},
    }
    return Outcome(figures, model, seconds, classes, details)
