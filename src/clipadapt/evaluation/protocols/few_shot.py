"""Few shots: learn from some pictures of each class, be judged on the test part (the protocol of arXiv 2109.01134).

The support set is drawn from the training part by the published sampler. With `val` the few validation pictures that
the published code draws beside it, min(shots, 4) a class, choose what a method's paper chooses so; with `search` the
method's search space is cross-validated inside the support set.
"""

from __future__ import annotations

import math
from typing import Any

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.evaluation.protocol import Outcome, fit, judged
from clipadapt.evaluation.selection import select
from clipadapt.methods import Method, create
from clipadapt.methods.artifact import recipe


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    shots: int = 16,
    val: bool = False,
    search: bool = False,
) -> Outcome:
    support, held_out = split.few_shot(shots, seed=seed)
    details: dict[str, Any] = {}
    if search and method.search_space and max(support.counts) > 1:
        key, given = method.card.key, recipe(method)["hyperparameters"]
        fixed = {name: value for name, value in given.items() if name not in method.search_space}
        trials = select(
            backbone, support, keys=[key], folds=min(5, shots), budget=math.inf, overrides={key: fixed}
        ).trials
        best = trials[-1]
        method = create(key, **best.hyperparameters)
        details["searched"] = {name: best.hyperparameters[name] for name in method.search_space}
    more: dict[str, Any] = {"val": held_out} if val else {}
    model, seconds = fit(method, backbone, support, **more)
    figures, classes, shown = judged(model, split.test)
    return Outcome(figures, model, seconds, classes, shown | details)
