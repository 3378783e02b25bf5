"""Cross data set: learn one data set, be judged on others by their class names alone (arXiv 2203.05557, section 4.2).

`targets` are definitions' names; their files are in the suite's data folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.data.definitions.definition import load
from clipadapt.errors import DataError
from clipadapt.evaluation.choosing import SEED, with_chosen
from clipadapt.evaluation.protocol import Outcome, check, fit, judge
from clipadapt.methods import Method


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    shots: int = 16,
    targets: Sequence[str] = (),
    choose: Mapping[str, Sequence[Any]] | None = None,
) -> Outcome:
    """Figures of `judge` on the test part, "on NAME" for each target, and "others": their mean.

    Args:
        shots: images of each class to learn from.
        targets: names or paths of definitions to be judged on; in a suite, a list of lists.
        choose: hyper-parameters to choose on training images that are put aside (`with_chosen`).
    """
    if not targets:
        raise DataError("cross-dataset needs targets: the names of the data sets to be judged on.")
    check(method, backbone, new_classes=True)
    chosen: dict[str, Any] = {}
    if choose:
        aside = split.train.few_shot(shots, seed=SEED)
        method, chosen["chosen"] = with_chosen(method, backbone, split.train, aside, choose)
    model, seconds = fit(method, backbone, split.train.few_shot(shots, seed=seed))
    figures, classes, details = judge(model, split.test)
    there: dict[str, float] = {}
    for name in targets:
        test = load(name).split.test
        other = model.with_classes(test.class_names) if method.card.new_classes else None
        if other is None:  # a method that learns nothing is made again
            other, _ = fit(replace(method), backbone, None, class_names=test.class_names)
        there[name] = judge(other, test)[0]["accuracy"]
    figures |= {"others": fmean(there.values())} | {f"on {Path(name).stem}": value for name, value in there.items()}
    return Outcome(figures, model, seconds, classes, details | chosen)
