"""Few shots: learn from some images of each class, be judged on the test part (the protocol of arXiv 2109.01134).

The support set is drawn from the training part by the published sampler. Three options say how hyper-parameters are
chosen: with `val`, on the few validation images that the published code draws as well, where a method's paper does so;
with `search`, by cross-validation inside the support set; with `choose`, on other training images, which is more than
few shots would have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.evaluation.choosing import SEED, with_chosen
from clipadapt.evaluation.protocol import Outcome, fit, judge
from clipadapt.evaluation.selection import select
from clipadapt.methods import Method, create
from clipadapt.methods.recipe import recipe


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    shots: int = 16,
    val: bool = False,
    search: bool = False,
    choose: Mapping[str, Sequence[Any]] | None = None,
) -> Outcome:
    """Figures of `judge` on the test part.

    Args:
        shots: images of each class to learn from.
        val: give the method the published validation images, min(shots, 4) of each class.
        search: cross-validate the method's search space inside the support set first.
        choose: hyper-parameters to choose on training images that are put aside (`with_chosen`).
    """
    support, held_out = split.few_shot(shots, seed=seed)
    details: dict[str, Any] = {}
    if choose:
        aside = split.train.few_shot(shots, seed=SEED)
        method, details["chosen"] = with_chosen(method, backbone, split.train, aside, choose)
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
    figures, classes, shown = judge(model, split.test)
    return Outcome(figures, model, seconds, classes, shown | details)
