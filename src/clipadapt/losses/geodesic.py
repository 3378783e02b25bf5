"""Mixup on the hypersphere for contrastive learning, and how aligned and uniform features on it are.

Mixing and its losses: Oh et al., "Geodesic Multi-Modal Mixup for Robust Fine-Tuning" (arXiv 2203.03897), formulas of
the official repository changdaeoh/multimodal-mixup. Alignment and uniformity: Wang and Isola, "Understanding
Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere" (arXiv 2005.10242).

All features are (B, D) of unit norm; row i of `image` belongs to row i of `text`. `weight` is the share of the first
of two that are mixed, in [0, 1]. Each loss is a scalar in nats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

Mix = Callable[[Tensor, Tensor, float], Tensor]


def slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """The point of the geodesic between unit rows that is `weight` from `second` to `first`, of unit norm: (B, D).

    (sin(w a) first + sin((1 - w) a) second) / sin a, with a the angle between them. Equal rows stay as they are; of
    opposite rows the geodesic is not unique.
    """
    angle = (first * second).sum(1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()  # (B, 1)
    return (torch.sin(weight * angle) * first + torch.sin((1 - weight) * angle) * second) / torch.sin(angle)


def lerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Linear mixup, inside the sphere: the ablation of `slerp`."""
    return weight * first + (1 - weight) * second


def multi_modal_mixup(image: Tensor, text: Tensor, weight: float, logit_scale: float, mix: Mix = slerp) -> Tensor:
    """m2-Mix: each image and each text against its pair, with the mixed other pairs as hard negatives.

        m_j = mix(image_j, text_j)        mean over i, and over both modalities x, of
        -log  exp(s image_i . text_i) / (exp(s image_i . text_i) + sum_{j != i} exp(s x_i . m_j))

    Mixed negatives lie between the modalities, thus nearer to each than those of the other one.
    """
    mixed = mix(image, text, weight)  # (B, D)
    pairs = (image * text).sum(1)  # (B,)
    target = torch.arange(len(image), device=image.device)
    own = torch.eye(len(image), dtype=torch.bool, device=image.device)
    losses = [
        cross_entropy(logit_scale * torch.where(own, pairs[:, None], anchor @ mixed.T), target)
        for anchor in (image, text)
    ]
    return (losses[0] + losses[1]) / 2


def uni_modal_mixup(mixed: Tensor, other: Tensor, weight: float, logit_scale: float, mix: Mix = slerp) -> Tensor:
    """V-Mix (images mixed, texts as they are) or, with the two exchanged, L-Mix; symmetric InfoNCE with soft labels.

    Row i is mixed with row B - 1 - i; the target is `weight` for its own pair and the rest for that other one.
    """
    logits = logit_scale * mix(mixed, mixed.flip(0), weight) @ other.T  # (B, B)
    own = torch.eye(len(mixed), device=mixed.device)
    return _symmetric(logits, weight * own + (1 - weight) * own.flip(0))


def both_modal_mixup(image: Tensor, text: Tensor, weight: float, logit_scale: float, mix: Mix = slerp) -> Tensor:
    """VL-Mix: images and texts, each mixed within its modality by the same weight; two positives for each row.

    Row i is mixed with row B - 1 - i, and both i and B - 1 - i count as its pair, each with a target of 1.
    """
    images, texts = mix(image, image.flip(0), weight), mix(text, text.flip(0), weight)  # (B, D) each
    own = torch.eye(len(image), device=image.device)
    return _symmetric(logit_scale * images @ texts.T, own + own.flip(0))


def _symmetric(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of rows and of columns with a symmetric target (B, B), their mean."""
    rows = -(target * log_softmax(logits, 1)).sum(1).mean()
    return (rows - (target * log_softmax(logits, 0)).sum(0).mean()) / 2


def alignment(image: Tensor, text: Tensor, power: float = 2.0) -> Tensor:
    """Mean of |image_i - text_i|^power over the pairs; 0 is best, 4 the most for power 2."""
    return (image - text).norm(dim=1).pow(power).mean()


def uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean of exp(-t |x_i - x_j|^2) over all pairs of rows; lower is more uniform, 0 is all in one place."""
    return torch.pdist(features.float()).pow(2).mul(-t).exp().mean().log()
