"""Wrong labels: a share of the support set is given another class, uniformly (symmetric noise).

The same images and the same wrong labels for every method; the count of wrong ones is rounded over the whole set.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset, Split
from clipadapt.evaluation.protocol import Outcome, check, fit, judge
from clipadapt.methods import Method


def with_wrong_labels(support: Dataset, share: float, seed: int) -> Dataset:
    """`share` in [0, 1] of the labels replaced by another one."""
    rng = np.random.default_rng(seed)
    labels = np.array(support.labels)
    wrong = rng.choice(len(labels), round(share * len(labels)), replace=False)
    classes = len(support.class_names)
    labels[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return replace(support, labels=labels.tolist())


def run(method: Method, backbone: Backbone, split: Split, seed: int, *, shots: int = 16, noise: float = 0.2) -> Outcome:
    """Figures of `judge` on the test part.

    Args:
        shots: images of each class to learn from, those with wrong labels included.
        noise: share of wrong labels, in [0, 1].
    """
    check(method, backbone, from_labels=True)
    support = with_wrong_labels(split.train.few_shot(shots, seed=seed), noise, seed)
    model, seconds = fit(method, backbone, support)
    figures, classes, details = judge(model, split.test)
    return Outcome(figures, model, seconds, classes, details)
