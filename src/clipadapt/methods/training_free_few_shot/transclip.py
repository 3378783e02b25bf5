"""TransCLIP: unlabelled images are classified together, by Gaussian classes, their neighbours, and zero-shot CLIP.

    z_i = softmax over c of  lambda log y_ic + (g_ic + 50/6 [(W + W') z + V' Y]_ic) / 50        five sweeps, then
    mu_c = unit((Z'X)_c / U + 50 gamma / S (Y'S)_c),   sigma = the same weighting of (x - mu)^2, shared by classes

y are zero-shot probabilities, g_ic = -1/2 sum_d (x_id - mu_cd)^2 / sigma_d, W (U, U) the cosines of each unlabelled
image with its 3 nearest others, V (S, U) those of each labelled image with its 3 nearest unlabelled ones, Y the
labels, one-hot. lambda is 1 without labelled images and 0.5 with them. Each round of this block majorise-minimise
procedure lowers the objective; ten rounds are taken.

Zanella, Gérin and Ben Ayed, "Boosting Vision-Language Models with Transduction" (arXiv 2406.01837). Its abstract was
read; formulas, constants and start are those of the official repository MaxZanella/transduction-for-vlms: variance
1/D, means from the labelled images, or for a class without any from the 8 unlabelled ones of its highest zero-shot
probability; gamma from a grid on `val`, where a validation image is given the assignment of its nearest unlabelled
image. Without `val`, gamma is the smallest of the grid, which trusts few labelled images least (ours).

In the official code the rows of W and V do not correspond to those of z and Y, labelled images lose their nearest
neighbour, every gamma goes on from the state of the last, and the assignments of the last gamma are returned:
`variant="official-code"`. Without labelled images the two variants are one. An image is never its own neighbour
here; there the first neighbour is left out, which is another one where two images are equal.

`assignments_` (U, C) are the transductive answer for the unlabelled images, in the order given. Any image is
predicted from what was learned without the neighbours, lambda log y + g / 50, which is linear in x (ours): of the
images that were fitted about 99 in 100 get the same class, and accuracy is up to 0.8 points lower.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.methods import Classifier, FeatureMethod, Run, Support, hyper, method

GAMMAS = (0.002, 0.01, 0.02, 0.2)
ROUNDS, SWEEPS, CONFIDENT, SCALE = 10, 5, 8, 50.0

State = tuple[Tensor, Tensor, Tensor]  # assignments (U, C), means (C, D), variance (D,)


def log_density(x: Tensor, means: Tensor, variance: Tensor) -> Tensor:
    """(U, D), (C, D), (D,) -> (U, C): -1/2 sum_d (x_d - mu_cd)^2 / variance_d, by matrix products."""
    scaled = x / variance
    return scaled @ means.T - 0.5 * ((x * scaled).sum(1, keepdim=True) + (means.square() / variance).sum(1))


def nearest(rows: Tensor, x: Tensor, k: int, *, leave_out: str = "none", block: int = 1024) -> Tensor:
    """Sparse (R, U): the cosines of unit rows (R, D) with their k nearest of x (U, D), `block` rows at a time.

    `leave_out`: "self" (`rows` are `x`), "first" (the nearest, whatever it is), or "none".
    """
    first = int(leave_out == "first")
    k = max(min(k, len(x) - (leave_out != "none")), 0)
    cosines, columns = [torch.empty(0, k)], [torch.empty(0, k, dtype=torch.long)]
    for start in range(0, len(rows), block):
        cosine = rows[start : start + block] @ x.T  # (block, U)
        if leave_out == "self":
            cosine.diagonal(start).fill_(-torch.inf)
        top = cosine.topk(k + first, dim=1)
        cosines.append(top.values[:, first:])
        columns.append(top.indices[:, first:])
    places = torch.stack([torch.arange(len(rows)).repeat_interleave(k), torch.cat(columns).flatten()])
    return torch.sparse_coo_tensor(places, torch.cat(cosines).flatten(), (len(rows), len(x)), check_invariants=True)


def affinities(x: Tensor, support: Tensor, k: int, official: bool = False) -> tuple[Tensor, Tensor]:
    """W + W' (U, U) and V' (U, S), sparse; x (U, D), support (S, D).

    `official`: the rows [support; x] of one matrix are cut after the first U, as if they were [x; support].
    """
    if official:
        both = nearest(torch.cat([support, x]), x, k, leave_out="first")
        among, across = (both.index_select(0, rows) for rows in torch.arange(len(both)).split([len(x), len(support)]))
    else:
        among, across = nearest(x, x, k, leave_out="self"), nearest(support, x, k)
    return (among + among.T).coalesce(), across.T.coalesce()


def first_means(x: Tensor, z: Tensor, support: Tensor, one_hot: Tensor) -> Tensor:
    """Unit means (C, D): of a class's labelled images, or of its most probable unlabelled ones where it has none."""
    weight, rows = z.topk(min(CONFIDENT, len(x)), dim=0)  # (8, C)
    confident = torch.zeros_like(z).scatter_(0, rows, weight).T @ x  # (C, D)
    return normalize(torch.where(one_hot.sum(0)[:, None] > 0, one_hot.T @ support, confident), dim=1)


def gaussians(x: Tensor, z: Tensor, support: Tensor, one_hot: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Unit means (C, D) and shared variance (D,) of images x (U, D) assigned by z (U, C) and of labelled ones."""
    share = SCALE * gamma / max(len(support), 1)
    sums = z.T @ x / len(x) + share * (one_hot.T @ support)  # (C, D)
    mass = z.sum(0) / len(x) + share * one_hot.sum(0)  # (C,)
    squares = z.sum(1) @ x.square() / len(x) + share * (one_hot.sum(1) @ support.square())  # (D,)
    means = normalize(sums / mass.clamp(min=1e-30)[:, None], dim=1)
    variance = squares - 2 * (means * sums).sum(0) + mass @ means.square()
    return means, (variance / mass.sum()).clamp(min=1e-10)


def transduce(
    x: Tensor, prior: Tensor, among: Tensor, pull: Tensor, support: Tensor, one_hot: Tensor, gamma: float, state: State
) -> State:
    """Ten rounds from `state`; prior (U, C) = lambda log y, among = W + W' (U, U), pull (U, C) = V' Y.

    The neighbour terms come scaled: both are 50 / (2 k) times their cosines.
    """
    z, means, variance = state
    for done in range(ROUNDS + 1):
        density = log_density(x, means, variance)
        for _ in range(SWEEPS):
            z = (prior + (density + among @ z + pull) / SCALE).softmax(dim=1)
        if done < ROUNDS:
            means, variance = gaussians(x, z, support, one_hot, gamma)
    return z, means, variance


@method(
    "transclip",
    title="Boosting Vision-Language Models with Transduction",
    arxiv="2406.01837",
    problem="transductive zero-shot and few-shot classification",
    signal="unlabelled",
    unlabelled=True,
)
class TransClip(FeatureMethod, Classifier):
    """Transductive Gaussian classes of unlabelled images; gamma is chosen on `val` where it is given.

    `assignments_` (U, C) are the probabilities of the unlabelled images that `fit` was given.

    >>> model = create("transclip").fit(backbone, support, unlabelled=unlabelled)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    gamma: float = hyper(GAMMAS[0], "weight of labelled images, >= 0 (official grid 0.002 to 0.2)", low=0)
    lmbda: float | None = hyper(None, "weight of zero-shot, >= 0; 1 without labels, 0.5 with (official)", low=0)
    neighbours: int = hyper(3, "nearest images that pull at each one (official)", low=1)
    variant: str = hyper("paper", "the method, or the official code's row orders", choices=("paper", "official-code"))

    def _fit(self, support: Support, run: Run) -> None:
        assert support.unlabelled is not None  # the card's signal
        x, shots, one_hot = support.unlabelled, support.images, support.one_hot
        few_shot, official = len(shots) > 0, self.variant == "official-code"
        lmbda = self.lmbda if self.lmbda is not None else 0.5 if few_shot else 1.0
        log_y = (support.logit_scale * x @ support.texts.T).log_softmax(dim=1)  # (U, C)
        among, across = affinities(x, shots, self.neighbours, official and few_shot)
        strength = SCALE / (2 * self.neighbours)
        among, pull = strength * among, strength * (across @ one_hot)
        y = log_y.exp()
        state = start = y, first_means(x, y, shots, one_hot), torch.full((x.shape[1],), 1 / x.shape[1])
        searched, best = few_shot and support.val is not None, -1.0
        for gamma in GAMMAS if searched else (self.gamma,):
            state = transduce(x, lmbda * log_y, among, pull, shots, one_hot, gamma, state if official else start)
            accuracy = 0.0
            if searched and support.val is not None:
                near = (support.val[0] @ x.T).argmax(dim=1)  # (V,)
                accuracy = (state[0][near].argmax(dim=1) == support.val[1]).double().mean().item()
            if accuracy > best:
                best, self.gamma_, kept = accuracy, gamma, state
        self.assignments_, means, variance = state if official else kept
        self.weight_ = lmbda * support.logit_scale * support.texts + means / variance / SCALE  # (C, D)
        self.bias_ = -0.5 * (means.square() / variance).sum(1) / SCALE  # (C,)
