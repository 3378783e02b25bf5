"""CLIP-Adapter: a bottleneck on the image feature, mixed back into it.

    z = r * relu(relu(x W1') W2') + (1 - r) * x        logits = s * unit(z) T'

Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters" (arXiv 2110.04544), section 3.2, the
image-only variant; sizes, ratio and optimiser from the official repository gaopengcuhk/CLIP-Adapter (reduction 4,
ratio 0.2, no biases, ReLU after both layers; SGD 2e-3, momentum 0.9, weight decay 5e-4, cosine). The official code
feeds un-normalised features; as the network has no biases, scaling x scales z, and unit features give the same logits.
Departure: features are encoded once, without augmentation.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, relu

from clipadapt.methods import Classifier, FeatureMethod, Run, Support, hyper, method
from clipadapt.training.loop import seeded


def adapt(x: Tensor, w1: Tensor, w2: Tensor, ratio: float) -> Tensor:
    """(N, D) features through the bottleneck w1 (H, D), w2 (D, H), mixed back by `ratio`; not normalised."""
    return ratio * relu(relu(x @ w1.T) @ w2.T) + (1 - ratio) * x


@method(
    "clip-adapter",
    title="CLIP-Adapter: Better Vision-Language Models with Feature Adapters",
    arxiv="2110.04544",
    trains="bottleneck adapter",
)
class ClipAdapter(FeatureMethod, Classifier):
    """A two-layer bottleneck adapter on image features.

    >>> model = create("clip-adapter", epochs=2, ratio=0.5).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    ratio: float = hyper(0.2, "share of the adapted feature, in [0, 1] (paper: 0.2)", low=0, high=1)
    reduction: int = hyper(4, "D over the bottleneck's width (official)", low=1)
    lr: float = hyper(2e-3, "SGD learning rate (official)", low=0)
    epochs: int = hyper(200, "passes over the support set (official for 16 shots)", low=1)
    batch_size: int = hyper(32, "images a step (official)", low=1)
    seed: int = hyper(1, "initial weights and order of the images")

    # The published rate suits a logit scale of 100; smaller scales make smaller gradients.
    search_space = {"ratio": (0.2, 0.6), "lr": (2e-3, 0.1)}

    def _fit(self, support: Support, run: Run) -> None:
        dim = support.images.shape[1]
        with seeded(self.seed):
            w1 = torch.nn.Linear(dim, max(dim // self.reduction, 1), bias=False).weight
            w2 = torch.nn.Linear(w1.shape[0], dim, bias=False).weight
        weight = support.logit_scale * support.texts  # (C, D)

        def loss_of(rows: Tensor) -> Tensor:
            z = normalize(adapt(support.images[rows], w1, w2, self.ratio), dim=1)
            return cross_entropy(z @ weight.T, support.labels[rows])

        optimizer = torch.optim.SGD([w1, w2], lr=self.lr, momentum=0.9, weight_decay=5e-4)
        self._descend(loss_of, optimizer, support, run)
        self.w1_, self.w2_, self.weight_ = w1.detach(), w2.detach(), weight

    def _logits(self, images: Tensor) -> Tensor:
        return normalize(adapt(images, self.w1_, self.w2_, self.ratio), dim=1) @ self.weight_.T  # (N, C)
