"""GDA: Gaussian discriminant analysis on image features, added to zero-shot logits; a closed form.

    mu_c = mean of class c,   P = D ((N-1) Sigma + tr(Sigma) I)^-1,   W = P mu',   b_c = log(1/C) - mu_c' P mu_c / 2
    logits = s x T' + alpha (x W + b)                       Sigma = pooled covariance within classes

Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation" (arXiv 2402.04087), section 3; the
shrunk precision (Kubokawa and Srivastava) and the grid of alpha from the official repository mrflogs/ICLR24.
Departures: solved by Cholesky in float64 instead of a pseudo-inverse in float32; one plain view instead of ten
augmented ones. With one image a class Sigma is zero, and as in the official code the result is zero-shot.

**New classes** (`with_classes`), by the repository's `main_base2new.py`: the 64 support images most similar to a new
class's text w stand in for its own; mu is the mean of these and of 16 copies of w, the precision the mean over the new
classes of the shrunk one about w. Learned classes keep their weights, and next to new ones they win more often than
they should: the paper judges each part alone. The support features are kept for this. In that file the base classes
use the mean of the class covariances with a pseudo-inverse: `covariance="balanced-pinv"`.

**Unlabelled images**, by equations 5 and 6 of the authors' project page (there is no code): expectation maximisation
from zero-shot probabilities r_ic. M: mu_c = sum_i r_ic x_i / sum_i r_ic, Sigma = the mean over classes of their
r-weighted covariances, P as above. E: r = softmax of the logits above. Until r changes by less than 0.001, at most 30
rounds (ours). Labelled images among them keep r = their label (ours): this helps where they are few, and with 16 a
class labels alone do better. It sharpens what zero-shot knows: where that is little more than chance, or images are
only a few a class, it can end below zero-shot.

**Long tails**: the page applies the same formulas, and the repository has no code of its own for them.
`covariance="balanced"` takes the M step's covariance, to which each class contributes alike, for labelled images
too: the few classes with many images then do not determine it (ours). The prior stays uniform, as in the repository.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clipadapt.methods import Classifier, FeatureMethod, Run, Support, hyper, method
from clipadapt.training.search import best_on

GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
NEIGHBOURS, TEXT_COPIES = 64, 16
ROUNDS, TOLERANCE = 30, 1e-3


def discriminant(x: Tensor, y: Tensor, classes: int, covariance: str = "pooled") -> tuple[Tensor, Tensor]:
    """Weights (C, D) and biases (C,) of Gaussian classes that share a covariance; x (N, D), y (N,)."""
    return gaussians(x, one_hot(y, classes), covariance)


def gaussians(x: Tensor, r: Tensor, covariance: str = "pooled") -> tuple[Tensor, Tensor]:
    """Weights (C, D) and biases (C,) from x (N, D) and how much each image belongs to each class, r (N, C).

    A class without an image gets the mean of all images: nothing speaks for or against it.
    """
    x, r = x.double(), r.double()
    (n, d), classes, mass = x.shape, r.shape[1], r.sum(0)
    means = r.T @ x / mass.clamp(min=1e-300)[:, None]  # (C, D)
    means[mass == 0] = x.mean(0)
    if covariance == "pooled":
        share = torch.full_like(mass, 1 / max(n - 1, 1))
    elif covariance == "balanced":
        share = torch.where(mass > 0, 1 / (classes * mass), 0)
    else:
        share = torch.where(mass > 1, 1 / (classes * (mass - 1)), 0)
    weighted = share * mass  # (C,)
    sigma = (x * (r @ share)[:, None]).T @ x - (means * weighted[:, None]).T @ means  # (D, D)
    weight = torch.zeros_like(means)
    if sigma.trace() > 1e-12:  # else every class is one point, and its covariance says nothing
        if covariance == "balanced-pinv":
            weight = means @ torch.linalg.pinv(sigma, rtol=d * torch.finfo(torch.float32).eps, hermitian=True)
        else:
            shrunk = (n - 1) * sigma + sigma.trace() * torch.eye(d, dtype=x.dtype)
            weight = d * torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk)).T  # (C, D)
    return weight.float(), _bias(means, weight)


def _bias(means: Tensor, weight: Tensor) -> Tensor:
    return (-math.log(len(means)) - (means * weight).sum(1) / 2).float()  # (C,)


def mixture(
    x: Tensor, zero_shot: Tensor, alpha: float, labelled: Tensor, one_hot: Tensor, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """Weights (C, D) and biases (C,) by expectation maximisation from the zero-shot logits (U, C) of x (U, D).

    labelled (N, D), one_hot (N, C): images whose class is known; N may be 0.
    """
    rows, r = torch.cat([labelled, x]), zero_shot.softmax(dim=1)  # (N + U, D), (U, C)
    for _ in range(rounds):
        weight, bias = gaussians(rows, torch.cat([one_hot, r]), "balanced")
        before, r = r, (zero_shot + alpha * (x @ weight.T + bias)).softmax(dim=1)
        if (r - before).abs().max() < TOLERANCE:
            break
    return weight, bias


def new_means(texts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Means (M, D) of classes known by their unit texts (M, D), and their nearest of the rows (N, D): (M, k)."""
    nearest = (texts @ rows.T).topk(min(NEIGHBOURS, len(rows)), dim=1).indices
    sums = rows[nearest].double().sum(1) + TEXT_COPIES * texts.double()
    return sums / (nearest.shape[1] + TEXT_COPIES), nearest


def new_classes(texts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (M, D) and biases (M,) of new classes by their unit texts (M, D) and the support features (N, D).

    For each class the precision D (Z'Z + t I)^-1 is taken of its k neighbours Z (k, D), centred on its text, with t the
    trace of their covariance, by a k x k system: (Z'Z + t I)^-1 = (I - Z' (Z Z' + t I)^-1 Z) / t.
    """
    means, nearest = new_means(texts, rows)
    k, d = nearest.shape[1], texts.shape[1]
    precision = torch.zeros(d, d, dtype=torch.float64)
    for text, neighbours in zip(texts, nearest, strict=True):
        z = (rows[neighbours] - text).double()  # (k, D)
        t = (z.square().sum() / max(k - 1, 1)).clamp(min=1e-12)
        factor = torch.linalg.cholesky(z @ z.T + t * torch.eye(k, dtype=z.dtype))
        half = torch.linalg.solve_triangular(factor, z, upper=False)  # (k, D)
        precision += d / t * (torch.eye(d, dtype=z.dtype) - half.T @ half)
    weight = means @ precision / len(texts)
    return weight.float(), _bias(means, weight)


@method(
    "gda-clip",
    title="A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation",
    arxiv="2402.04087",
    new_classes=True,
    unlabelled=True,
)
class GdaClip(FeatureMethod, Classifier):
    """Linear discriminant analysis with a shrunk covariance; alpha is chosen on `val` where it is given.

    >>> model = create("gda-clip").fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    alpha: float = hyper(1.0, "weight of the discriminant against zero-shot, >= 0 (official grid 1e-4..100)", low=0)
    covariance: str = hyper(
        "pooled",
        "of labelled images: over all, over classes alike, or the latter unshrunk as officially in base to new",
        choices=("pooled", "balanced", "balanced-pinv"),
    )

    search_space = {"alpha": GRID}

    def _fit(self, support: Support, run: Run) -> None:
        images, unlabelled = support.images, support.unlabelled
        texts = support.logit_scale * support.texts  # (C, D)
        alphas = (self.alpha,) if support.val is None else GRID
        if unlabelled is None:
            fits = dict.fromkeys(alphas, gaussians(images, support.one_hot, self.covariance))
        else:
            zero_shot = unlabelled @ texts.T  # (U, C)
            fits = {a: mixture(unlabelled, zero_shot, a, images, support.one_hot) for a in alphas}
        self.alpha_ = self.alpha
        if support.val is not None:
            x, y = support.val
            self.alpha_ = best_on(y, ((a, x @ texts.T + a * (x @ w.T + b)) for a, (w, b) in fits.items()))[0]
        weight, bias = fits[self.alpha_]
        self.gda_weight_, self.gda_bias_, self.learned_ = weight, bias, list(self.class_names_)  # (C, D), (C,), names
        self.rows_ = images if unlabelled is None else torch.cat([images, unlabelled])  # (N, D)
        self.weight_, self.bias_ = texts + self.alpha_ * weight, self.alpha_ * bias

    def _reclassify(self, model: Any) -> None:
        texts = self._class_texts(model)  # (M, D)
        place = {name: i for i, name in enumerate(self.learned_)}
        weight, bias = torch.zeros_like(texts), torch.zeros(len(texts))
        old = torch.tensor([name in place for name in self.class_names_])
        at = [place[name] for name in self.class_names_ if name in place]
        weight[old], bias[old] = self.gda_weight_[at], self.gda_bias_[at]
        if not old.all():
            weight[~old], bias[~old] = new_classes(texts[~old], self.rows_)
            bias[~old] += math.log(int((~old).sum()) / len(place))  # equal priors for all, as the learned ones have
        self.weight_, self.bias_ = model.logit_scale * texts + self.alpha_ * weight, self.alpha_ * bias
