"""Adversarial accuracy: how many images a fitted model still recognises when each may be changed a little.

White-box attacks in the L-infinity ball of plain pixel values, through the model's own image tower and classifier, as
in Mao et al., "Understanding Zero-Shot Adversarial Robustness for Large-Scale Models" (arXiv 2212.07016): PGD, or
AutoAttack (Croce and Hein, arXiv 2003.01690) if the package `torchattacks` is installed. An image that is not
recognised unchanged counts as lost and is not attacked; the unchanged image is in the ball, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.methods import Method
from clipadapt.training.attacks import LEVEL, PixelSpace, pgd
from clipadapt.training.loop import seeded
from clipadapt.training.pixels import Pixels


class NotAttackable(ClipadaptError):
    """The model's predictions cannot be differentiated with respect to pixels, on any data."""


@dataclass(frozen=True)
class Robustness:
    """Accuracies in [0, 1] of one model on one data set.

    Attributes:
        clean: of the images as they are.
        attacked: of the attacked ones, by the attack's radius in levels of 1/255.
    """

    clean: float
    attacked: dict[float, float]


def adversarial_accuracy(
    model: Method,
    data: Dataset,
    *,
    eps: Sequence[float] = (1.0, 2.0, 4.0),
    attack: str = "pgd",
    steps: int = 20,
    step_size: float | None = None,
    batch_size: int = 64,
    seed: int = 1,
) -> Robustness:
    """Clean and attacked accuracy, each image decoded once; classes are matched by name, as in `Method.score`.

    Args:
        model: fitted on a backbone whose encodings are differentiable, with one class for each image.
        eps: radii of the attacks, in levels of 1/255 of a channel's range.
        attack: "pgd" or "autoattack" (standard version; needs the package `torchattacks`).
        steps: of PGD.
        step_size: of PGD, in levels of 1/255; by default 2.5 radii over the number of steps, which reaches any corner
            of the ball from any start.
        batch_size: images attacked at a time.
        seed: of the random starts.

    Raises:
        NotAttackable: the model has no gradient from its prediction to the pixels.
        ClipadaptError: the data or an argument does not fit; AutoAttack's package is missing.
    """
    if attack not in ("pgd", "autoattack"):
        raise unknown_name("attack", attack, ("pgd", "autoattack"))
    if steps < 1 or any(radius < 0 for radius in eps):
        raise ClipadaptError("adversarial_accuracy: steps must be at least 1 and every eps at least 0.")
    if not len(data):
        raise ClipadaptError("adversarial_accuracy needs at least one labelled image.")
    places = _places(model, data)
    backbone = model.backbone_
    assert backbone is not None  # `_places` has looked
    space = PixelSpace.of(backbone)
    scores = _scores(model, space)
    pixels = Pixels(backbone, data, min_scale=1.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    right, still = 0, dict.fromkeys(map(float, eps), 0)
    for rows in torch.arange(len(data)).split(batch_size):
        plain, labels = space.plain(pixels.batch(rows, 0)), places[rows]
        with torch.no_grad():
            kept = scores(plain).argmax(1) == labels  # (B,)
        right += int(kept.sum())
        if not kept.any():
            continue
        plain, labels = plain[kept.to(plain.device)], labels[kept]
        for radius in still:
            if attack == "autoattack":
                attacked = _auto_attack(scores, plain, labels, radius * LEVEL, len(model.class_names_), seed)
            else:
                size = 2.5 * radius / steps if step_size is None else step_size
                levels = {"eps": radius * LEVEL, "step_size": size * LEVEL}
                attacked = pgd(scores, plain, labels, steps=steps, generator=generator, **levels)
            with torch.no_grad():
                still[radius] += int((scores(attacked).argmax(1) == labels).sum())
    return Robustness(right / len(data), {radius: count / len(data) for radius, count in still.items()})


def _places(model: Method, data: Dataset) -> Tensor:
    """(N,) each image's class as a column of the model's logits."""
    if model.multi_label_ or not isinstance(data, Dataset):
        raise ClipadaptError("adversarial_accuracy is for models and images of one class each.")
    if model.head is None:
        raise NotAttackable(f"{model.card.key} has a custom prediction path that cannot be differentiated.")
    if model.backbone_ is None or "gradients" not in model.backbone_.capabilities:
        raise NotAttackable(f"This {model.card.key} has no differentiable image tower, so it cannot be attacked.")
    places = model.places_of(data.class_names)
    return torch.tensor([places[label] for label in data.labels])


def _scores(model: Method, space: PixelSpace) -> Callable[[Tensor], Tensor]:
    """Plain images (B, 3, H, W) -> the model's logits (B, C) on the CPU, differentiable."""

    def scores(plain: Tensor) -> Tensor:
        logits = model.head.logits(model.encoder.encode(space.pixels(plain)).cpu())
        if torch.is_grad_enabled() and plain.requires_grad and not logits.requires_grad:
            raise NotAttackable(f"The classifier of {model.card.key} is not differentiable, so it cannot be attacked.")
        return logits

    return scores


class _Scorer(nn.Module):
    def __init__(self, scores: Callable[[Tensor], Tensor], device: torch.device) -> None:
        super().__init__()
        self.scores = scores
        self.place = nn.Parameter(torch.empty(0, device=device))  # attacks run where the parameters are

    def forward(self, plain: Tensor) -> Tensor:
        return self.scores(plain).to(plain.device)


def _auto_attack(
    scores: Callable[[Tensor], Tensor], plain: Tensor, labels: Tensor, eps: float, classes: int, seed: int
) -> Tensor:
    try:
        from torchattacks import AutoAttack
    except ImportError as error:
        raise ClipadaptError(
            'attack="autoattack" needs the package torchattacks with torchvision: pip install torchattacks torchvision.'
        ) from error
    if classes < 4:
        raise ClipadaptError(f"AutoAttack's losses need at least 4 classes, not {classes}.")
    scorer = _Scorer(scores, plain.device)
    adversary = AutoAttack(scorer, norm="Linf", eps=eps, n_classes=classes, seed=seed)
    with seeded(seed):
        return adversary(plain, labels)
