"""LP++: a linear probe whose class weights are image prototypes plus learned multiples of the text features.

    logits_c = x (w_c + alpha_c t_c)'        min over w, alpha of the mean cross-entropy of the support set

Huang et al., "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP" (arXiv 2404.02285): two blocks of
variables, step sizes from (approximate) Lipschitz constants and starting values from the data, so that nothing needs
searching. The constants are those of the official repository FereshteShakeri/FewShot-CLIP-Strong-Baseline:

    w_c = sum of the class's images           step 4 N / lambda_max(S'S), momentum 0.9, at every iteration
    alpha_c = 250 mean_c(own-class cosine)    step N / (4 max_c sum_i (x_i t_c')^2), at every tenth iteration

With `val` the best iteration counts, ties go to the last, as there; without, the last iteration. Cosines are not
multiplied by the logit scale: alpha takes its place.

Where the official code leaves the paper's model, `variant="official"` follows it: it also trains a bias, drawn at
random, and never clears alpha's gradient, so that each step of alpha takes the sum of all gradients since the start.
Departures: a class without an image does not count in alpha's start; one plain view instead of an augmented one.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.methods import Classifier, FeatureMethod, Run, Support, hyper, method
from clipadapt.training.loop import seeded, train


def step_sizes(images: Tensor, texts: Tensor) -> tuple[float, float]:
    """The step sizes (of w, of alpha) for support features (N, D) and text features (C, D)."""
    n, d = images.shape
    x = images.double()
    gram = x.T @ x if d < n else x @ x.T  # both have the same greatest eigenvalue; the smaller one is cheaper
    greatest = torch.linalg.eigvalsh(gram)[-1].item()
    return 4 * n / greatest, n / (4 * (images @ texts.T).square().sum(0).max().item())


def initial_alpha(images: Tensor, labels: Tensor, texts: Tensor, scale: float) -> float:
    """`scale` times the mean over classes of their images' mean cosine with the class's own text."""
    cosines = (images * texts[labels]).sum(1).double()  # (N,)
    counts = torch.bincount(labels, minlength=len(texts))  # (C,)
    sums = torch.zeros(len(texts), dtype=cosines.dtype).index_add_(0, labels, cosines)
    seen = counts > 0
    return scale * (sums[seen] / counts[seen]).mean().item()


@method(
    "lp++",
    title="LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP",
    arxiv="2404.02285",
    trains="linear head and text multipliers",
)
class LpPlusPlus(FeatureMethod, Classifier):
    """A text-informed linear probe without anything to search; `val`, where given, chooses the iteration.

    >>> model = create("lp++").fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    steps: int = hyper(300, "full-batch iterations (official)", low=1)
    alpha_scale: float = hyper(250.0, "alpha's start over the mean own-class cosine (official)", low=0)
    alpha_every: int = hyper(10, "iterations of w for each one of alpha (official)", low=1)
    momentum: float = hyper(0.9, "momentum of w's steps, in [0, 1] (official)", low=0, high=1)
    variant: str = hyper(
        "paper", '"official" adds its bias and its accumulated gradient of alpha', choices=("paper", "official")
    )
    seed: int = hyper(1, "initial biases; only the official variant has them")

    def _fit(self, support: Support, run: Run) -> None:
        images, labels, texts = support.images, support.labels, support.texts
        classes, dim = texts.shape
        official = self.variant == "official"
        lr_w, lr_alpha = step_sizes(images, texts)
        w = (support.one_hot.T @ images).requires_grad_()  # (C, D)
        alpha = torch.full((classes,), initial_alpha(images, labels, texts, self.alpha_scale), requires_grad=True)
        bias = torch.zeros(classes)
        if official:
            with seeded(self.seed):
                bias = torch.nn.Linear(dim, classes).bias
        gradient = torch.zeros(classes)  # of alpha, summed since the start
        step = 0

        def alpha_gradient(now: Tensor) -> Tensor:
            """What alpha's optimiser sees: nothing between two of alpha's iterations."""
            if official:
                now = gradient.add_(now).clone()
            return now if (step + 1) % self.alpha_every == 0 else torch.zeros_like(now)

        alpha.register_hook(alpha_gradient)
        cosines = images @ texts.T  # (N, C)

        def loss_of(number: int) -> Tensor:
            nonlocal step
            step = number
            return cross_entropy(images @ w.T + bias + alpha * cosines, labels)

        best = torch.tensor(-1.0, dtype=torch.double)
        kept = [w.detach().clone(), alpha.detach().clone(), bias.detach().clone()]  # of the best iteration

        def keep(number: int) -> None:
            if support.val is not None:
                x, y = support.val
                accuracy = ((x @ (w + alpha[:, None] * texts).T + bias).argmax(1) == y).double().mean()
                if accuracy < best:
                    return
                best.copy_(accuracy)
            elif number < self.steps - 1:
                return
            for of, now in zip(kept, (w, alpha, bias), strict=True):
                of.copy_(now.detach())

        groups = [
            {"params": [w, bias] if official else [w], "lr": lr_w, "momentum": self.momentum},
            {"params": [alpha], "lr": lr_alpha, "momentum": 0.0},
        ]
        state = [best, gradient, *kept]
        train(loss_of, torch.optim.SGD(groups), range(self.steps), run=run, after_step=keep, state=state)
        w, self.alpha_, self.bias_ = kept  # (C, D), (C,), (C,)
        self.weight_ = w + self.alpha_[:, None] * texts  # (C, D)
