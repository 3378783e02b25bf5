"""Backbone effects: several CLIP backbones err on different images; their logits are weighed by a few labels.

    log p(x) = log softmax over classes of  sum_b w_b log softmax(l_b(x)) / tau_b        l_b: logits on backbone b

Rodriguez-Opazo et al., "Unveiling Backbone Effects in CLIP: Exploring Representational Synergies and Variances" (arXiv
2312.14400). Only the abstract could be read: backbones trained on the same data are right on different images, an
informed choice of backbone for each image could add over 20 points, and a simple combination of predictions adds up
to 6.34. There is no official code. `overlap` reports the first two; the combination's formula is ours:

tau_b is the temperature with the lowest cross-entropy of backbone b alone, then w the weights >= 0 with the lowest one
of all together, each with a penalty |1 / tau - 1|^2 / 2N or |w - 1 / B|^2 / 2N, so that few images cannot push a
scale to infinity. Both problems are convex and solved by Newton's method. Their N images are `val` where it is given,
else the support set: as it is where the wrapped method learns from names alone, else each image held out once in up
to five folds. A class's only image cannot be held out; with no other image, tau = 1 and w = 1 / B.

On features alone, `fit_scales` and `combine` do the same to any logits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import Dataset, MultiLabelDataset
from clipadapt.data.splits import stratified_folds
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, Run, TrainingData, Wrapper, hyper, method
from clipadapt.methods.tasks.classification import Head


def best_scales(logits: Tensor, labels: Tensor, centre: float, rounds: int = 100) -> Tensor:
    """The scales a (B,) >= 0 that minimise CE(sum_b a_b logits_b, labels) + |a - centre|^2 / 2N, in float64.

    logits (B, N, C), labels (N,). Newton's method with halved steps; a scale that would become negative is set to 0.
    """
    z = logits.double().log_softmax(dim=2)
    count, n, _ = z.shape
    own = z[:, torch.arange(n), labels]  # (B, N)
    free = torch.ones(count, dtype=torch.bool)
    a = torch.full((count,), centre, dtype=torch.float64)

    def objective(a: Tensor) -> Tensor:
        return cross_entropy(torch.tensordot(a, z, 1), labels) + (a - centre).square().sum() / (2 * n)

    for _ in range(rounds):
        p = torch.tensordot(a, z, 1).softmax(dim=1)  # (N, C)
        mean = (z * p).sum(2)  # (B, N)
        gradient = (mean - own).mean(1) + (a - centre) / n
        hessian = (torch.einsum("nc,bnc,dnc->bd", p, z, z) - mean @ mean.T + torch.eye(count)) / n
        step = torch.zeros_like(a)
        step[free] = -torch.linalg.solve(hessian[free][:, free], gradient[free])
        while objective(a + step) > objective(a) and step.abs().max() > 1e-12:
            step = step / 2
        a = a + step
        if (a < 0).any():
            free &= a > 0
            a = a.clamp(min=0)
        elif step.abs().max() < 1e-9:
            break
    return a


def fit_scales(logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Temperatures (B,) and weights (B,) of B backbones from their logits (N, C) and labels (N,)."""
    z = torch.stack(list(logits))
    sharpness = torch.cat([best_scales(one[None], labels, 1.0) for one in z]).clamp(min=1e-3)
    weights = best_scales(z * sharpness[:, None, None].to(z.dtype), labels, 1 / len(z))
    return (1 / sharpness).float(), weights.float()


def combine(logits: Sequence[Tensor], temperatures: Tensor, weights: Tensor) -> Tensor:
    """B times logits (N, C), temperatures (B,), weights (B,) -> logits (N, C)."""
    scaled = [w * one.log_softmax(dim=1) / t for one, t, w in zip(logits, temperatures, weights, strict=True)]
    return torch.stack(scaled).sum(0)


def overlap(predictions: Sequence[Any], labels: Any) -> dict[str, Any]:
    """How far B predictions (N,) complement one another on labels (N,); all values are shares of the N images.

    accuracy  of each backbone (B,)
    both      right in both of two backbones (B, B)
    only      right in this backbone and in no other (B,)
    oracle    right in at least one: what choosing the backbone for each image could reach
    """
    right = np.stack([np.asarray(p) == np.asarray(labels) for p in predictions])  # (B, N)
    alone = right & (right.sum(0) == 1)
    both = (right[:, None] & right[None]).mean(2)
    return {
        "accuracy": right.mean(1).tolist(),
        "both": both.tolist(),
        "only": alone.mean(1).tolist(),
        "oracle": float(right.any(0).mean()),
    }


def held_out(of: Any, towers: list[Backbone], support: Dataset, run: Run) -> tuple[list[Tensor], Tensor]:
    """Logits (N', C) on each backbone, and labels (N',), of support images while they were held out."""
    k = min(5, max(support.counts))
    folds = stratified_folds(support.labels, k, of.seed) if k > 1 else []
    judged: list[list[Tensor]] = [[torch.empty(0, len(support.class_names))] for _ in towers]
    for fold in folds:
        rest = support.select([r for r in range(len(support)) if r not in set(fold)])
        for outputs, tower in zip(judged, towers, strict=True):
            inner = of._fit_inner(tower, rest, run)
            outputs.append(inner.image_logits(support.select(fold))[0])
    labels = [support.labels[r] for fold in folds for r in fold]
    useful = torch.tensor([support.counts[label] > 1 for label in labels], dtype=torch.bool)
    return [torch.cat(outputs)[useful] for outputs in judged], torch.tensor(labels, dtype=torch.long)[useful]


@method(
    "backbone-effects-study",
    title="Unveiling Backbone Effects in CLIP: Exploring Representational Synergies and Variances",
    arxiv="2312.14400",
    problem="backbone complementarity and ensembling",
    trains="a weight and a temperature for each backbone",
)
class BackboneEffectsStudy(Wrapper, Classifier):
    """One method on several backbones, their logits weighed by labelled images.

    `temperatures_` and `weights_` (B,) are in the order of the backbone given to `fit` and then `backbones`. Saving
    keeps what the methods learned and the names and fingerprints of the backbones; loading loads these again.

    >>> model = create("backbone-effects-study", method="tip-adapter").fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    method: Any = hyper("zero-shot", "the method to fit on each backbone: a key or an unfitted method")
    backbones: list[str] = hyper([], "further backbones, as `load_backbone` takes them: hub ids, folders, files")
    seed: int = hyper(1, "of the folds")

    def _fit(self, model: Backbone, data: TrainingData, run: Run) -> None:
        if not all(isinstance(source, str) for source in self.backbones):
            raise ClipadaptError(f"{self.card.key}: backbones must be a list of names, not {self.backbones!r}.")
        towers = [model, *(load_backbone(source, model.device) for source in self.backbones)]
        self.inner_ = [self._fit_inner(tower, data.support, run) for tower in towers]
        from_names = self._unfitted().card.signal == "none"
        judged = data.val if data.val is not None else data.support if from_names else None
        if judged is not None:
            logits, labels = [inner.image_logits(judged)[0] for inner in self.inner_], torch.tensor(judged.labels)
        else:
            logits, labels = held_out(self, towers, data.support, run)
        if len(labels):
            self.temperatures_, self.weights_ = fit_scales(logits, labels)
        else:
            self.temperatures_, self.weights_ = torch.ones(len(towers)), torch.full((len(towers),), 1 / len(towers))
        run.trained = 2 * len(towers) + sum(inner.trained_parameters for inner in self.inner_)

    @property
    def head(self) -> Head | None:
        """That of the wrapped method, scaled, on a single backbone; with several, logits take more than features."""
        inner = self._fitted("inner_")[0].head
        if inner is None or len(self.inner_) > 1:
            return None
        return Head(lambda images: combine([inner.logits(images)], self.temperatures_, self.weights_))

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """See `Classifier.image_logits`; with several backbones it takes images, not pixels."""
        each, kept = self.each_logits(images, on_error=on_error, progress=progress)
        return combine(each, self.temperatures_, self.weights_), kept

    def overlap(self, data: Dataset) -> dict[str, Any]:
        """`overlap` of the backbones on labelled images, and the accuracy of their `uniform` and `fitted` average.

        Classes must be those of the support set, in its order.
        """
        return overlap_of(self, data)


def overlap_of(of: BackboneEffectsStudy, data: Dataset) -> dict[str, Any]:
    """See `BackboneEffectsStudy.overlap`."""
    if isinstance(data, MultiLabelDataset) or data.class_names != of._fitted("class_names_"):
        raise ClipadaptError("overlap needs labelled images of the classes that were learned, in their order.")
    each, _ = of.each_logits(data)
    labels = np.array(data.labels)
    uniform = torch.stack([one.log_softmax(dim=1) for one in each]).mean(0)
    fitted = combine(each, of.temperatures_, of.weights_)
    return overlap([one.argmax(1) for one in each], labels) | {
        "uniform": float((uniform.argmax(1).numpy() == labels).mean()),
        "fitted": float((fitted.argmax(1).numpy() == labels).mean()),
    }
