"""Domain generalisation: learn from some domains, be judged on each domain of the test part.

`learned` names the domains to learn from; without it, they are those of the training part. "seen" is the mean
accuracy over the learned domains, "unseen" that over all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.errors import DataError
from clipadapt.evaluation.choosing import SEED, with_chosen
from clipadapt.evaluation.protocol import Outcome, fit
from clipadapt.methods import Method


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    shots: int = 16,
    learned: Sequence[str] | None = None,
    choose: Mapping[str, Sequence[Any]] | None = None,
) -> Outcome:
    """Figures "seen" and "unseen": the mean accuracy over the domains that were learned from, and over all others.

    Args:
        shots: images of each class to learn from, over all learned domains together.
        learned: domains to learn from; None for those of the training part. In a suite, a list of lists.
        choose: hyper-parameters to choose on training images of these domains that are put aside (`with_chosen`).
    """
    train, test = split.train, split.test
    if train.domains is None or test.domains is None:
        raise DataError(f"{train.name} has no domains.")
    seen = set(learned or train.domains)
    absent = seen - set(train.domains)
    if absent:
        raise DataError(f"{train.name} has no domain {min(absent)!r}; it has {', '.join(sorted(set(train.domains)))}.")
    pool = train.select(i for i, domain in enumerate(train.domains) if domain in seen)
    details: dict[str, Any] = {}
    if choose:
        method, details["chosen"] = with_chosen(method, backbone, pool, pool.few_shot(shots, seed=SEED), choose)
    support = pool.few_shot(shots, seed=seed)
    model, seconds = fit(method, backbone, support)
    hits = model.image_logits(test)[0].argmax(1).numpy() == np.array(test.labels)
    domains = np.array(test.domains)
    by_domain = {str(d): float(hits[domains == d].mean()) for d in dict.fromkeys(test.domains)}
    figures = {"seen": fmean(a for d, a in by_domain.items() if d in seen)}
    others = [a for d, a in by_domain.items() if d not in seen]
    if others:
        figures["unseen"] = fmean(others)
    details |= {"by_domain": by_domain, "learned": sorted(seen)}
    return Outcome(figures, model, seconds, details=details)
