"""What methods share that train weights of the towers by looking at pictures: batches of pixels, AdamW, a cosine.

Such a method copies the backbone, says which parameters of the copy learn, writes a loss of a batch, and calls
`_train`; then it keeps what changed in `tower_` and the classifier in `weight_` (see `WeightMethod`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import normalize

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset, class_texts
from clipadapt.methods.base import Run, WeightMethod, hyper
from clipadapt.training.loop import Loss, batches, train
from clipadapt.training.pixels import Pixels
from clipadapt.training.schedules import cosine

TOWERS = {"vision": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}


@dataclass(frozen=True)
class PixelBatch:
    """Some pictures of the support set, as one training step sees them.

    number  of the step, from 0
    rows    (B,) which pictures they are
    pixels  (B, 3, H, W)
    labels  (B,) int64
    """

    number: int
    rows: Tensor
    pixels: Tensor
    labels: Tensor


def tower_parameters(backbone: Backbone, tower: str) -> dict[str, Parameter]:
    """The parameters of a tower and its projection, by their names in `backbone.model`, ready to learn.

    tower: "vision", "text", or "both", which is all but the logit scale.
    """
    starts = TOWERS["vision"] + TOWERS["text"] if tower == "both" else TOWERS[tower]
    found = {name: p for name, p in backbone.model.named_parameters() if name.startswith(starts)}
    for parameter in found.values():
        parameter.requires_grad_()
    return found


def class_encoder(backbone: Backbone, class_names: Sequence[str], templates: Any) -> Callable[[], Tensor]:
    """A function that encodes the classes' texts as `encode_classes` does, but on the device and with gradients.

    Each call gives unit rows (C, D) by the text tower as it then is. Texts that classes share are encoded once, and
    in an order that does not depend on that of the classes.
    """
    sentences = class_texts(class_names, templates)
    unique = sorted({text for texts in sentences for text in texts})
    ids = backbone.tokenize(unique).to(backbone.device)  # (T, L)
    uses = torch.tensor([[texts.count(text) for text in unique] for texts in sentences], device=backbone.device).float()
    return lambda: normalize(uses @ backbone.encode_tokens(ids), dim=1)  # (C, T) @ (T, D) -> (C, D)


class Captions:
    """All captions of the classes, and one drawn for each picture of a batch."""

    def __init__(self, backbone: Backbone, sentences: list[list[str]], seed: int) -> None:
        row_of = {text: row for row, text in enumerate(sorted({text for texts in sentences for text in texts}))}
        self.ids = backbone.tokenize([*row_of]).to(backbone.device)  # (T, L)
        self._rows = [torch.tensor([row_of[text] for text in texts]) for texts in sentences]
        self._seed = seed

    def draw(self, labels: Tensor, number: int) -> Tensor:
        """Rows of `ids` (B,) for pictures of these labels (B,); a function of the seed and the step's `number`."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        shares = torch.rand(len(labels), generator=generator).tolist()
        chosen = [self._rows[c] for c in labels.tolist()]
        return torch.stack([rows[int(share * len(rows))] for rows, share in zip(chosen, shares, strict=True)])

    def encode(self, backbone: Backbone, labels: Tensor, number: int) -> Tensor:
        """The drawn captions' features (B, D), with gradients; one that several pictures drew is encoded once."""
        drawn, place = self.draw(labels, number).unique(return_inverse=True)
        return backbone.encode_tokens(self.ids[drawn])[place]


def detached(parameters: dict[str, Parameter]) -> dict[str, Tensor]:
    """Copies on the CPU, to be kept."""
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


@dataclass(kw_only=True)
class TowerMethod(WeightMethod):
    """Base of the methods that train on pixels; the hyper-parameters below get the values of the method's paper."""

    lr: float = hyper(1e-5, "AdamW learning rate", low=0)
    epochs: int = hyper(10, "passes over the support set", low=1)
    batch_size: int = hyper(64, "pictures a step", low=1)
    min_scale: float = hyper(0.9, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)
    seed: int = hyper(1, "what is drawn at random: crops, the order of the pictures, initial values")

    weight_decay: ClassVar[float] = 0.1
    clip_norm: ClassVar[float | None] = 1.0  # greatest norm of the whole gradient
    warmup: ClassVar[float] = 0.1  # share of the run in which the rate rises

    def _train(
        self,
        backbone: Backbone,
        support: Dataset,
        parameters: Iterable[Tensor],
        loss_of: Callable[[PixelBatch], Loss],
        run: Run,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        after_step: Callable[[int], None] | None = None,
        state: Sequence[Tensor] = (),
    ) -> None:
        """Minimise `loss_of` over `parameters`; `optimizer` replaces AdamW, `after_step` and `state` as in `train`."""
        labels = torch.tensor(support.labels, device=backbone.device)
        pixels = Pixels(backbone, support, min_scale=self.min_scale, seed=self.seed)
        steps = batches(len(support), self.batch_size, epochs=self.epochs, seed=self.seed)
        warmup = int(self.warmup * len(steps))
        train(
            lambda step: loss_of(PixelBatch(step[0], step[1], pixels.batch(step[1], step[0]), labels[step[1]])),
            optimizer or torch.optim.AdamW([*parameters], lr=self.lr, weight_decay=self.weight_decay),
            list(enumerate(steps)),
            schedule=lambda step: cosine(step, len(steps), warmup),
            clip_norm=self.clip_norm,
            run=run,
            after_step=after_step,
            state=state,
        )

    @property
    def trained_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tower_.values())
