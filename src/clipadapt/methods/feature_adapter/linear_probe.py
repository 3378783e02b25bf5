"""Linear probe: multinomial logistic regression on frozen image features, the field's oldest baseline.

    logits = x W' + b,   min over W, b of  sum_i CE(logits_i, y_i) + |W|^2 / (2 C)

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020), appendix
A.3: L-BFGS, at most 1,000 iterations, the L2 strength swept on a validation set over a logarithmic range. Departure:
features have unit length here, which the paper's do not, so the strength that suits is larger; the default was chosen
by cross-validation inside support sets, never on test data. Classes without an image in the support set can never be
predicted: their logit is minus infinity.

Where images show several classes, each class has a logistic regression of its own against all other images, and its
logit is the log-odds. A class that none or all of the images show has its smoothed log-odds as a constant.
"""

import torch
from torch import Tensor

from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, FeatureMethod, Run, Support, hyper, method
from clipadapt.metrics.multilabel import mean_average_precision

SWEEP = (0.1, 1.0, 10.0, 100.0, 1000.0)


def logistic_regression(x: Tensor, y: Tensor, classes: int, strength: float, steps: int) -> tuple[Tensor, Tensor]:
    """Weights (C, D) and biases (C,) of the regularised maximum-likelihood classifier on (N, D) features."""
    from sklearn.linear_model import LogisticRegression  # here, as it takes a second to import

    solver = LogisticRegression(C=strength, max_iter=steps).fit(x.double().numpy(), y.numpy())
    w, b = torch.from_numpy(solver.coef_).float(), torch.from_numpy(solver.intercept_).float()
    if len(w) == 1:  # two classes: scikit-learn keeps only the second one's weights
        w, b = torch.cat([-w, w]) / 2, torch.cat([-b, b]) / 2
    weight, bias = torch.zeros(classes, x.shape[1]), torch.full((classes,), -torch.inf)
    seen = torch.from_numpy(solver.classes_)
    weight[seen], bias[seen] = w, b
    return weight, bias


def one_vs_rest(x: Tensor, y: Tensor, strength: float, steps: int) -> tuple[Tensor, Tensor]:
    """Weights (C, D) and biases (C,) of one two-class regression for each class; y (N, C) bool."""
    present = y.sum(0).double()
    weight, bias = torch.zeros(y.shape[1], x.shape[1]), ((present + 0.5) / (len(y) - present + 0.5)).log().float()
    for c in ((present > 0) & (present < len(y))).nonzero()[:, 0]:
        (no, yes), (b_no, b_yes) = logistic_regression(x, y[:, c].long(), 2, strength, steps)
        weight[c], bias[c] = yes - no, b_yes - b_no
    return weight, bias


@method(
    "linear-probe",
    title="Learning Transferable Visual Models From Natural Language Supervision",
    arxiv="2103.00020",
    trains="linear head",
    multi_label=True,
)
class LinearProbe(FeatureMethod, Classifier):
    """Logistic regression on image features; class names play no part.

    >>> model = create("linear-probe").fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    strength: float = hyper(100.0, "inverse L2 strength C > 0; chosen on val among the sweep where val is given", low=0)
    steps: int = hyper(1000, "at most this many L-BFGS iterations (paper)", low=1)

    search_space = {"strength": SWEEP}

    def _fit(self, support: Support, run: Run) -> None:
        labels, best = support.labels, -1.0
        if labels.ndim == 1 and len(labels.unique()) < 2:
            raise ClipadaptError("linear-probe needs images of at least two classes.")
        for strength in (self.strength,) if support.val is None else SWEEP:
            if labels.ndim == 2:
                weight, bias = one_vs_rest(support.images, labels, strength, self.steps)
            else:
                weight, bias = logistic_regression(support.images, labels, len(support.texts), strength, self.steps)
            score = 0.0
            if support.val is not None:
                x, y = support.val
                logits = x @ weight.T + bias
                hits = logits.argmax(1) == y if y.ndim == 1 else None
                score = hits.float().mean().item() if hits is not None else mean_average_precision(y, logits)
            if score > best:
                best, self.weight_, self.bias_, self.strength_ = score, weight, bias, strength
        run.trained = weight.numel() + bias.numel()
