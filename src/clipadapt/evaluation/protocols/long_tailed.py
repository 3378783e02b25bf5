"""Long tails: classes have fewer and fewer labelled images, and all count the same in the end ("macro").

Class c of C, in a random order, has head * imbalance ** (-c / (C - 1)) images, at least one, as in the long-tailed
versions of CIFAR (Cui et al., "Class-Balanced Loss", arXiv 1901.05555). "many", "medium" and "few" are the mean
accuracies of the thirds of the classes with most, medium and fewest images.
"""

from __future__ import annotations

import numpy as np

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset, Split
from clipadapt.data.splits import group_by_label
from clipadapt.evaluation.protocol import Outcome, check, fit, judge
from clipadapt.methods import Method


def long_tail(train: Dataset, head: int, imbalance: float, seed: int) -> Dataset:
    """A support set whose largest class has `head` images, and `imbalance` times as many as the smallest."""
    rng = np.random.default_rng(seed)
    members = group_by_label(train.labels)
    order = rng.permutation(sorted(members))
    counts = np.maximum(1, np.round(head * imbalance ** (-np.arange(len(order)) / max(len(order) - 1, 1)))).astype(int)
    chosen: list[int] = []
    for label, count in zip(order.tolist(), counts.tolist(), strict=True):
        chosen += rng.permutation(members[label])[:count].tolist()
    return train.select(sorted(chosen))


def run(
    method: Method, backbone: Backbone, split: Split, seed: int, *, head: int = 32, imbalance: float = 16.0
) -> Outcome:
    """Figures of `judge` on the test part, and "many", "medium" and "few": the thirds of the classes by their images.

    Args:
        head: images of the largest class to learn from.
        imbalance: how many times the images of the smallest class the largest has.
    """
    check(method, backbone, from_labels=True)
    support = long_tail(split.train, head, imbalance, seed)
    model, seconds = fit(method, backbone, support)
    figures, classes, details = judge(model, split.test)
    by_size = sorted(classes, key=lambda name: (-support.counts[support.class_names.index(name)], name))
    for name, part in zip(("many", "medium", "few"), np.array_split(by_size, 3), strict=True):
        if len(part):
            figures[name] = float(np.mean([classes[str(c)] for c in part]))
    return Outcome(figures, model, seconds, classes, details | {"counts": support.counts})
