"""What every prompt method is: frozen towers, and a `PromptLearner` that holds the learned tensors.

A prompt method's file has two parts: the learner, a small `nn.Module` bound to a backbone and to class names, with its
class features, image features and loss; and the method, a dataclass of hyper-parameters that makes the learner. This
module trains it, keeps its parameters (and nothing else), and binds them to new class names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone, Insertion
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images, other_tower
from clipadapt.methods.base import Method, Run, hyper, label_array
from clipadapt.training.loop import Loss, batches, seeded, train
from clipadapt.training.pixels import Pixels
from clipadapt.training.schedules import cosine_by_epoch


@dataclass(frozen=True)
class Batch:
    """Some pictures of the support set, as one training step sees them.

    rows      (B,) which ones they are
    labels    (B,) int64; (B, C) bool where a picture can show several classes
    features  (B, D) unit features of the frozen image tower; None where the learner reads pixels
    pixels    (B, 3, H, W), None where it reads features
    """

    rows: Tensor
    labels: Tensor
    features: Tensor | None
    pixels: Tensor | None


class PromptLearner(nn.Module):
    """Learned tensors (the parameters) bound to a backbone and to C class names.

    Write `texts`, and `vision` where tokens enter the image tower; override `loss`, `images` or `logits` where the
    method has its own. Constants that need class names or texts are made in `__init__`, once.
    """

    def __init__(self, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.class_names = backbone, list(class_names)
        self.logit_scale = backbone.logit_scale

    def texts(self) -> Tensor:
        """Unit features of the classes (C, D)."""
        raise NotImplementedError

    def vision(self) -> list[Insertion]:
        """Tokens in the image tower; without any, features are those of the frozen tower."""
        return []

    @property
    def image_dim(self) -> int:
        """Length of a row of `images`."""
        return self.backbone.dim

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> what `logits` takes of them (B, K): here their unit features, prompted (B, D)."""
        with self.backbone.inserted(vision=self.vision()):
            return self.backbone.encode_images(pixels)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Image features (B, K) and class features (C, D) -> (B, C)."""
        return self.logit_scale * images @ texts.T

    def loss(self, batch: Batch) -> Loss:
        """What a step minimises, and which pictures were recognised (B,): here cross-entropy."""
        logits = self.logits(self.seen(batch), self.texts())
        return cross_entropy(logits, batch.labels), logits.argmax(1) == batch.labels

    def seen(self, batch: Batch) -> Tensor:
        """The pictures' features (B, K), with gradients where tokens are in the image tower."""
        if batch.features is not None:
            return batch.features
        assert batch.pixels is not None
        return self.images(batch.pixels)


@dataclass(kw_only=True)
class PromptMethod(Method):
    """Base of the prompt methods: write `_learner`; hyper-parameters below get the values of the method's paper."""

    lr: float = hyper(2e-3, "SGD learning rate, momentum 0.9, weight decay 5e-4 (CoOp)", low=0)
    epochs: int | None = hyper(None, "passes over the support set; by default 50, 100 or 200 by shots (CoOp)", low=1)
    batch_size: int = hyper(32, "pictures a step (CoOp)", low=1)
    views: int = hyper(
        0, "random crops of each picture, encoded once and used in turn (scale 0.08-1); 0: the picture itself", low=0
    )
    seed: int = hyper(1, "initial values and order of the pictures")

    reads_pixels: ClassVar[bool] = False  # whether training needs the image tower, because tokens are put into it
    clip_norm: ClassVar[float | None] = None  # greatest norm of the whole gradient

    def _learner(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        """The learner at its initial values, which may draw from torch's global stream."""
        raise NotImplementedError

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        with seeded(self.seed):
            learner = self._bind(backbone, support.class_names)
            self._train(learner, support, run)
        self.learned_: dict[str, Tensor] = {name: p.detach().cpu() for name, p in learner.named_parameters()}
        self._restore(backbone)

    def _train(
        self,
        learner: PromptLearner,
        support: Dataset,
        run: Run,
        after_step: Callable[[int], None] | None = None,
        state: Sequence[Tensor] = (),
    ) -> None:
        """The training of CoOp and its descendants: SGD, cosine by epoch, cross-entropy or the learner's own loss.

        `after_step` and `state` are those of `train`.
        """
        epochs = self._epochs(support)
        steps = batches(len(support), self.batch_size, epochs=epochs, seed=self.seed)
        per_epoch = len(steps) // epochs
        batch_of = self._batches(learner.backbone, support)
        train(
            lambda step: learner.loss(batch_of(step[1], step[0] // per_epoch)),
            torch.optim.SGD(learner.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4),
            list(enumerate(steps)),
            schedule=lambda step: cosine_by_epoch(step, per_epoch, epochs, 1e-5 / self.lr if self.lr else 0.0),
            clip_norm=self.clip_norm,
            run=run,
            after_step=after_step,
            state=state,
        )

    def _epochs(self, support: Dataset) -> int:
        shots = max(support.counts)
        return self.epochs or (50 if shots == 1 else 100 if shots <= 4 else 200)

    def _batches(self, backbone: Backbone, support: Dataset) -> Callable[[Tensor, int], Batch]:
        """A function from (rows, epoch) to the batch: features encoded once, or pixels decoded when asked for."""
        labels = torch.as_tensor(label_array(support), device=backbone.device)
        if self.reads_pixels:
            min_scale = getattr(self, "min_scale", 1.0)
            pixels = Pixels(backbone, support, min_scale=min_scale, seed=self.seed)
            return lambda rows, epoch: Batch(rows, labels[rows], None, pixels.batch(rows, epoch))
        encoded = encode_images(backbone, support, views=self.views, seed=self.seed, min_scale=0.08).features
        views = (encoded if encoded.ndim == 3 else encoded[:, None]).to(backbone.device)  # (N, V, D)
        return lambda rows, epoch: Batch(rows, labels[rows], views[rows, epoch % views.shape[1]], None)

    def _bind(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        try:
            return self._learner(backbone, class_names).to(backbone.device)
        except ClipadaptError as error:
            raise type(error)(f"{self.card.key}: {error}") from error

    def _restore(self, backbone: Backbone | None) -> None:
        self.backbone_ = backbone
        if backbone is None:
            return
        with seeded(self.seed):  # start values are made and thrown away
            self._bound = self._bind(backbone, self.class_names_).requires_grad_(False)
        self._bound.load_state_dict({k: v.to(backbone.device) for k, v in self.learned_.items()}, strict=True)
        with torch.no_grad():
            self._texts = self._bound.texts()  # (C, D), encoded once; the learned tensors say it all

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """See `Method.encode_pixels`; where tokens are in the image tower, the prompted one is meant."""
        self._fitted("backbone_")
        return self._bound.images(pixels) if self.reads_pixels else super().encode_pixels(pixels)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """See `Method.encode_texts`: the texts take the place of class names in the learned prompt."""
        other = copy.copy(self)
        other.class_names_ = list(texts)
        other._reclassify(self._fitted("backbone_"))
        features = other._texts
        if features.shape != (len(texts), self._bound.backbone.dim):
            raise ClipadaptError(
                f"{self.card.key} has no one feature of a text, as what it compares depends on the picture or is "
                "several: ask for one of the model's classes, or search without the model."
            )
        return features

    def _beside_image_tower(self) -> dict[str, Tensor]:
        return self.learned_ if self.reads_pixels else {}

    def image_tower(self) -> Any:
        """See `Method.image_tower`."""
        self._fitted("backbone_")
        if self.reads_pixels and self._bound.image_dim != self._bound.backbone.dim:
            raise ClipadaptError(
                f"{self.card.key} takes {self._bound.image_dim} numbers of a picture, which are no point of the space "
                "of texts: embed without the model."
            )
        return super().image_tower()

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """See `Method.image_logits`; where tokens are in the image tower, features are those of the prompted one."""
        self._fitted("backbone_")
        if not self.reads_pixels:
            return super().image_logits(images, on_error=on_error, progress=progress)
        tower = other_tower(self._bound.backbone, self._bound.images, self._bound.image_dim)
        encoded = encode_images(tower, images, cache=False, on_error=on_error, progress=progress)
        with torch.no_grad():
            return self._logits(encoded.features), encoded.kept

    def _logits(self, images: Tensor) -> Tensor:
        device = self._texts.device
        return self._bound.logits(images.to(device), self._texts).cpu()  # (N, C)

    @property
    def trained_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.learned_.values())
