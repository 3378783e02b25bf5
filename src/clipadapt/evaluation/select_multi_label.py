"""Which method suits pictures that each show any number of classes? Cross-validation inside the support set, by mAP.

As `select` does it for one class a picture, in the same words; a fold's score is its mean average precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clipadapt.backbones import Backbone
from clipadapt.data import MultiLabelDataset
from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.selection import OverBudget, Selection, Trial, duration, order_of, settings, stop_when_late
from clipadapt.methods import create, list_methods, method_class


def select_multi_label(
    backbone: Backbone,
    support: MultiLabelDataset,
    *,
    keys: Sequence[str] | None = None,
    budget: float = 60.0,
    folds: int = 5,
    seed: int = 1,
    templates: Any = "photo",
    progress: Callable[[str], None] | None = None,
) -> Selection:
    """Judge the methods that take sets of labels (or those of `keys`) within `budget` seconds, and choose the best.

    A trial's `accuracy` is the mean of the folds' mAP, without an interval. zero-shot is always judged; what would not
    end in time is skipped and named. Ties go to the earlier one: what trains nothing comes first.
    """
    tell = progress or (lambda line: None)
    known = [key for key in keys or list_methods() if method_class(key).card.multi_label]
    parts = support.folds(min(folds, len(support)), seed)
    end, trials, skipped = time.perf_counter() + budget, [], []
    for key in order_of(known):
        until = end if key != "zero-shot" else np.inf
        try:
            trials.append(_judge(backbone, key, parts, templates, until))
            tell(f"{key}: mAP {100 * (trials[-1].accuracy or 0):.1f} % in {trials[-1].seconds:.1f} s")
        except (OverBudget, ClipadaptError, FloatingPointError) as error:
            skipped.append((key, str(error)))
            tell(f"{key}: skipped, {error}")
    best = max(trials, key=lambda trial: trial.accuracy or 0)
    reason = f"{best.key} has the highest mAP on {len(support):,} pictures of the support set, each held out once"
    if best is trials[0]:
        reason = f"no method did better than zero-shot on {len(support):,} pictures of the support set"
    return Selection(trials, best, reason, skipped)


def _judge(
    backbone: Backbone,
    key: str,
    parts: Sequence[tuple[MultiLabelDataset, MultiLabelDataset]],
    templates: Any,
    until: float,
) -> Trial:
    """A method's best setting, each tried on all folds."""
    begun = time.perf_counter()
    best: tuple[float, dict[str, Any], int] | None = None
    tried = settings(method_class(key))
    for number, setting in enumerate(tried):
        scores, parameters = [], 0
        for fold, (train, held_out) in enumerate(parts):
            fits_after = len(parts) - fold
            begun_fit = time.perf_counter()
            if begun_fit >= until:
                raise OverBudget("no time was left")
            method = create(key, **{"templates": templates} | setting)
            model = method.fit(backbone, train, report=stop_when_late(fits_after, until))
            if held_out.targets.any():
                scores.append(model.score(held_out))
            parameters = model.trained_parameters
            took = time.perf_counter() - begun_fit
            if time.perf_counter() + took * (fits_after - 1) > until and best is None:
                raise OverBudget(f"it needs about {duration(took * len(parts))}")
        found = float(np.mean(scores)) if scores else 0.0
        if best is None or found > best[0]:
            best = found, setting, parameters
        spent = time.perf_counter() - begun
        if number + 1 < len(tried) and time.perf_counter() + spent / (number + 1) > until:
            break
    assert best is not None
    return Trial(key, {"templates": templates} | best[1], best[0], None, time.perf_counter() - begun, best[2])
