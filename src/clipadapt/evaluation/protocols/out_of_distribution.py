"""Known or unknown: can a model tell images of its classes from those of others (open set)?

The model learns the first half of the classes (as in base to new) and is shown test images of both halves; an image
counts as known by a score of its logits over the learned classes:

    probability   largest softmax probability; "mcm" where the logits are CLIP's (Ming et al., arXiv 2211.13445)
    logit         largest logit (Hendrycks et al., arXiv 1911.11132)
    energy        log-sum-exp of the logits (Liu et al., arXiv 2010.03759)

AUROC: the chance that a known image scores higher than an unknown one. FPR95: the share of unknown images that
pass where 95 % of the known ones do; lower is better.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.evaluation.protocol import Outcome, fit, judge
from clipadapt.evaluation.protocols.base_to_new import base_support
from clipadapt.methods import Method

SCORES = ("probability", "logit", "energy")


def scores(logits: Tensor, kind: str) -> np.ndarray:
    """How known images look (N,), from logits (N, C)."""
    if kind == "probability":
        return logits.double().softmax(1).amax(1).numpy()
    return (logits.amax(1) if kind == "logit" else logits.double().logsumexp(1)).numpy()


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Area under the ROC curve of scores of known (N,) against unknown images (M,)."""
    return float(roc_auc_score(np.repeat([1, 0], [len(known), len(unknown)]), np.concatenate([known, unknown])))


def fpr95(known: np.ndarray, unknown: np.ndarray) -> float:
    """Share of unknown images at or above the highest threshold that at least 95 % of the known ones reach."""
    ordered = np.sort(known)
    threshold = ordered[len(known) - int(np.ceil(0.95 * len(known)))]
    return float((unknown >= threshold).mean())


def run(method: Method, backbone: Backbone, split: Split, seed: int, *, shots: int = 16) -> Outcome:
    """Figures of `judge` on the known classes, and "auroc (SCORE)" and "fpr95 (SCORE)" of known against unknown.

    Args:
        shots: images of each known class to learn from.
    """
    known, unknown = split.test.base_new_split()
    model, seconds = fit(method, backbone, base_support(split.train, shots, seed))
    figures, classes, details = judge(model, known)
    inside, outside = (model.image_logits(part)[0][:, : len(known.class_names)] for part in (known, unknown))
    for kind in SCORES:
        pair = scores(inside, kind), scores(outside, kind)
        figures |= {f"auroc ({kind})": auroc(*pair), f"fpr95 ({kind})": fpr95(*pair)}
    return Outcome(figures, model, seconds, classes, details)
