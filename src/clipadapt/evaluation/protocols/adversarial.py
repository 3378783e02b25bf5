"""Adversarial images: learn as in few shots, be judged on test images, and on the same ones under attack.

The attack is PGD through the model's own tower and classifier (see `evaluation.robustness`). `eps` are radii in levels
of 1/255; in a suite, a list of lists, since a list makes separate cells. "attacked" is the accuracy at the
first of them. `limit`: at most this many test images per class, the same for every seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.evaluation.protocol import NotApplicable, Outcome, fit, judge
from clipadapt.evaluation.robustness import NotAttackable, adversarial_accuracy
from clipadapt.methods import Method


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    shots: int = 16,
    eps: float | Sequence[float] = (1.0, 2.0, 4.0),
    steps: int = 20,
    limit: int | None = None,
) -> Outcome:
    """Figures of `judge` on the test images, and "attacked": the accuracy under the first of the attacks.

    Args:
        shots: images of each class to learn from.
        eps: radii of the attacks, in levels of 1/255; in a suite, a list of lists.
        steps: of PGD.
        limit: at most this many test images of each class, the same for every seed; None for all.
    """
    radii = [eps] if isinstance(eps, int | float) else list(eps)
    if "gradients" not in backbone.capabilities:
        raise NotApplicable(f"{backbone.source} has no image tower that can be differentiated.")
    model, seconds = fit(method, backbone, split.train.few_shot(shots, seed=seed))
    test = split.test if limit is None else split.test.few_shot(limit, seed=1)
    try:
        found = adversarial_accuracy(model, test, eps=radii, steps=steps).attacked
    except NotAttackable as error:
        raise NotApplicable(str(error)) from None
    figures, classes, details = judge(model, test)
    figures["attacked"] = found[float(radii[0])]
    return Outcome(figures, model, seconds, classes, details | {"attacked": {f"{r:g}": a for r, a in found.items()}})
