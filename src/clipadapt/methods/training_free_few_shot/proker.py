"""ProKeR: kernel ridge regression of the labels whose penalty is the distance to zero-shot CLIP; a closed form.

    f(x) = f0(x) + k(x, S) (K / lambda + I)^-1 (Y - f0(S))        f0(x) = x T',  k(a, b) = exp(-beta (1 - a b'))

Bendou et al., "ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models" (arXiv
2501.11175), section 3; the solution as the authors' code writes it, which omarnust/BReg-Adapter keeps, with plain
cosines for f0, its grid for a search (beta outer, lambda inner, ties go to the first), and the values by number of
shots that it carries over from ImageNet. Small lambda stays near zero-shot.

The solution is lambda times that of the ridge problem min_f |Y - f(S)|^2 + lambda |f - f0|^2, whose correction
k(x, S) (K + lambda I)^-1 (Y - f0(S)) is `solution="textbook"`: there, *large* lambda stays near zero-shot.

The paper's two local baselines are the other estimators, each alpha times a local fit of the labels added to f0:
`nadaraya-watson`, the mean of the labels weighted by k (Tip-Adapter without this normalisation), and `local-linear`,
a linear fit weighted by k around each query, with a ridge lambda on its slopes.

Departures: logits are s f(x), so that without a correction probabilities are those of zero-shot; a search takes one
eigendecomposition a beta; the grid of alpha and the ridge of local slopes are ours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from clipadapt.methods import Classifier, FeatureMethod, Run, Support, hyper, method
from clipadapt.training.search import best_on

BETAS = torch.linspace(0.5, 3, 20).tolist()
LAMBDAS = torch.linspace(0.001, 1, 100).tolist()
ALPHAS = torch.linspace(0.1, 3, 30).tolist()
BY_SHOTS = {1: (3.0, 0.05), 2: (2.6, 0.05), 4: (1.5, 0.05), 8: (1.66, 0.07), 16: (1.7, 0.1)}  # (beta, lambda)


def kernel(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """Unit rows (M, D), (N, D) -> (M, N): the Gaussian kernel exp(-beta / 2 |a - b|^2)."""
    return (a @ b.T).mul_(beta).sub_(beta).exp_()  # in place: of 16,000 images with one another it is 1 GiB


def ridge(gram: Tensor, residuals: Tensor, lmbda: float, solution: str) -> Tensor:
    """Coefficients (N, C) of the correction, from the kernel matrix (N, N) and residuals (N, C), in float64.

    The largest things held at once are `gram` and two float64 matrices of its size.
    """
    system = gram.to(torch.float64, copy=True)
    system.diagonal().add_(lmbda)
    factor = torch.linalg.cholesky(system)
    del system
    return torch.cholesky_solve(residuals.double(), factor).contiguous() * (lmbda if solution == "published" else 1.0)


def ridge_path(gram: Tensor, cross: Tensor, residuals: Tensor, lmbdas: list[float], solution: str) -> Iterator[Tensor]:
    """Corrections (V, C) for each lambda: `cross` (V, N) times `ridge`, from a single eigendecomposition."""
    values, vectors = torch.linalg.eigh(gram.double())
    left, right = cross.double() @ vectors, vectors.T @ residuals.double()  # (V, N), (N, C)
    for lmbda in lmbdas:
        shrink = (lmbda if solution == "published" else 1.0) / (values.clamp(min=0) + lmbda)  # (N,)
        yield left @ (shrink[:, None] * right)


def nadaraya_watson(x: Tensor, keys: Tensor, values: Tensor, beta: float) -> Tensor:
    """(M, D) queries, (N, D) keys, (N, C) values -> (M, C): the mean of the values weighted by the kernel."""
    return (beta * (x @ keys.T)).softmax(dim=1) @ values


def local_linear(x: Tensor, keys: Tensor, values: Tensor, beta: float, lmbda: float) -> Tensor:
    """(M, D) queries, (N, D) keys, (N, C) values -> (M, C): at each query x, the b of

        min over b, A of  sum_i k(x, key_i) |value_i - b - A (key_i - x)|^2 + lambda |A|^2

    In the dual A = sum_i c_i (key_i - x)' with sum_i c_i = 0, so that one N x N system a query replaces a D x D one.
    """
    x, keys, values = x.double(), keys.double(), values.double()
    gram, ones = keys @ keys.T, torch.ones(len(keys), 1, dtype=torch.float64)
    out = []
    for queries in x.split(max(1, 2**24 // len(keys) ** 2)):  # at most 128 MiB of systems at a time
        affinity = queries @ keys.T  # (m, N)
        system = gram + torch.diag_embed(lmbda * (beta - beta * affinity).exp())  # (m, N, N)
        factor = torch.linalg.cholesky(system)
        both = torch.cholesky_solve(torch.cat([values, ones], dim=1).expand(len(queries), -1, -1), factor)
        solved, of_ones = both[..., :-1], both[..., -1:]  # (m, N, C), (m, N, 1)
        intercept = solved.sum(1, keepdim=True) / of_ones.sum(1, keepdim=True)  # (m, 1, C): of A x as well
        slope = affinity[:, None, :] @ (solved - of_ones * intercept)  # (m, 1, C)
        out.append((intercept + slope)[:, 0])
    return torch.cat(out)


def ridge_grid(
    x: Tensor, zero_shot: Tensor, keys: Tensor, residuals: Tensor, solution: str
) -> Iterator[tuple[tuple[float, float], Tensor]]:
    """((beta, lambda), logits (V, C)) over the published grid; zero_shot (V, C) of x (V, D)."""
    for beta in BETAS:
        path = ridge_path(kernel(keys, keys, beta), kernel(x, keys, beta), residuals, LAMBDAS, solution)
        for lmbda, correction in zip(LAMBDAS, path, strict=True):
            yield (beta, lmbda), zero_shot + correction


def local_fit(estimator: str, x: Tensor, keys: Tensor, values: Tensor, beta: float, lmbda: float) -> Tensor:
    """(M, D) queries, (N, D) keys, (N, C) values -> (M, C), by one of the paper's local baselines."""
    if estimator == "nadaraya-watson":
        return nadaraya_watson(x, keys, values, beta)
    return local_linear(x, keys, values, beta, lmbda).float()


def local_grid(
    estimator: str, x: Tensor, zero_shot: Tensor, keys: Tensor, values: Tensor, lmbda: float
) -> Iterator[tuple[tuple[float, float], Tensor]]:
    """((beta, alpha), logits (V, C)) of a local baseline; zero_shot (V, C) of x (V, D)."""
    for beta in BETAS:
        correction = local_fit(estimator, x, keys, values, beta, lmbda)
        for alpha in ALPHAS:
            yield (beta, alpha), zero_shot + alpha * correction


@method(
    "proker",
    title="ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models",
    arxiv="2501.11175",
)
class ProKeR(FeatureMethod, Classifier):
    """Proximal kernel ridge regression; beta and lambda (alpha for local estimators) are searched on `val`.

    >>> model = create("proker").fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    estimator: str = hyper(
        "ridge",
        "the paper's method, or one of its local baselines",
        choices=("ridge", "nadaraya-watson", "local-linear"),
    )
    solution: str = hyper("published", "which form of the ridge solution", choices=("published", "textbook"))
    beta: float | None = hyper(None, "sharpness of the kernel, >= 0; by shots 3.0 to 1.7 where None (official)", low=0)
    lmbda: float | None = hyper(None, "ridge lambda > 0; by shots 0.05 to 0.1 where None (official)", low=1e-6)
    alpha: float = hyper(1.0, "weight of a local estimator against cosines, >= 0 (ours)", low=0)

    search_space = {"solution": ("published", "textbook"), "lmbda": (0.03, 0.1, 0.3, 1.0, 3.0)}

    def _fit(self, support: Support, run: Run) -> None:
        images, texts, labels = support.images, support.texts, support.one_hot
        shots = len(images) / len(support.labels.unique())
        beta, lmbda = BY_SHOTS[max(k for k in BY_SHOTS if k <= shots)]
        self.beta_ = beta if self.beta is None else self.beta
        self.lmbda_ = lmbda if self.lmbda is None else self.lmbda
        self.alpha_ = self.alpha
        residuals = labels - images @ texts.T  # (N, C)
        if support.val is not None:
            x, y = support.val
            if self.estimator == "ridge":
                grid = ridge_grid(x, x @ texts.T, images, residuals, self.solution)
                self.beta_, self.lmbda_ = best_on(y, grid)[0]
            else:
                grid = local_grid(self.estimator, x, x @ texts.T, images, labels, self.lmbda_)
                self.beta_, self.alpha_ = best_on(y, grid)[0]
        self.weight_, self.keys_ = support.logit_scale * texts, images  # (C, D), (N, D)
        if self.estimator == "ridge":
            values = ridge(kernel(images, images, self.beta_), residuals, self.lmbda_, self.solution)
        else:
            values = self.alpha_ * labels
        self.values_ = (support.logit_scale * values).float()  # (N, C)

    def _logits(self, images: Tensor) -> Tensor:
        zero_shot = images @ self.weight_.T  # (M, C)
        if self.estimator == "ridge":
            return zero_shot + kernel(images, self.keys_, self.beta_) @ self.values_
        return zero_shot + local_fit(self.estimator, images, self.keys_, self.values_, self.beta_, self.lmbda_)
