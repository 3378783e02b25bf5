"""Adversarial images: within a small distance of an image, one that a classifier takes for something else.

Attacks work on `plain` images, whose values are in [0, 1]; `PixelSpace` leads to what a backbone takes, and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.errors import BackboneError

LEVEL = 1 / 255  # of an 8-bit channel, the unit in which attacks are measured


@dataclass(frozen=True)
class PixelSpace:
    """Plain images (B, 3, H, W) in [0, 1] to the pixels that a backbone takes: (plain - mean) / std, and back."""

    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)

    @classmethod
    def of(cls, backbone: Backbone) -> PixelSpace:
        transform = backbone.preprocess
        if not isinstance(transform, Preprocess):
            raise BackboneError(f"{backbone.source} does not say how it normalises pixels, so they cannot be attacked.")
        white = 255 * transform.rescale  # what the value 1 becomes before mean and deviation
        mean, std = (torch.tensor(x, device=backbone.device)[:, None, None] for x in (transform.mean, transform.std))
        return cls(mean / white, std / white)

    def pixels(self, plain: Tensor) -> Tensor:
        return (plain - self.mean) / self.std

    def plain(self, pixels: Tensor) -> Tensor:
        return (pixels * self.std + self.mean).clamp(0, 1)  # which only rounding has left


def pgd(
    scores: Callable[[Tensor], Tensor],
    plain: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent in the L-infinity ball: images (B, 3, H, W) on which the cross-entropy is high.

        x <- clip(x + step_size sign(grad CE(scores(x), labels)))     to [plain - eps, plain + eps] and to [0, 1]

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (arXiv 1706.06083). The last x is
    returned; no gradient is left in the parameters that `scores` uses.

    scores: differentiable, plain images (B, 3, H, W) -> (B, C) logits
    labels: (B,) int64, the classes to move away from
    eps, step_size: in the units of `plain`, so 1 / 255 is one level of an 8-bit channel
    generator: on the CPU, draws a start that is uniform in the ball; without it the images themselves are the start
    """
    if eps == 0:
        return plain.detach()
    plain = plain.detach()
    low, high = (plain - eps).clamp(min=0), (plain + eps).clamp(max=1)
    attacked = plain
    if generator is not None:
        noise = 2 * torch.rand(plain.shape, generator=generator, dtype=plain.dtype) - 1
        attacked = torch.clamp(plain + eps * noise.to(plain.device), low, high)
    for _ in range(steps):
        attacked.requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(scores(attacked), labels, reduction="sum")  # images do not depend on one another
            (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = torch.clamp(attacked.detach() + step_size * gradient.sign(), low, high)
    return attacked.detach()
