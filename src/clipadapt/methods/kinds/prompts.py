"""Prompt methods: frozen towers, and a `PromptLearner` that holds the learned tensors.

A prompt method's file has two parts: the learner, a small `nn.Module` bound to a method, a backbone and class names,
with its class features, image features and loss; and the method, whose hyper-parameters the learner reads. This module
trains the learner, keeps its parameters (and nothing else), and binds them to new class names.
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
from clipadapt.errors import ClipadaptError
from clipadapt.features import Adapted, Encoder, encode_images
from clipadapt.methods.base import Method
from clipadapt.methods.card import hyper
from clipadapt.methods.tasks.classification import Head
from clipadapt.methods.training_data import TrainingData
from clipadapt.training.loop import Loss, Run, batches, seeded, train
from clipadapt.training.pixels import Pixels
from clipadapt.training.schedules import cosine_by_epoch


@dataclass(frozen=True)
class Batch:
    """Some images of the support set, as one training step sees them.

    Attributes:
        rows: (B,) which ones they are.
        labels: (B,) int64; (B, C) bool where an image can show several classes.
        features: (B, D) unit features of the frozen image tower; None where the learner reads pixels.
        pixels: (B, 3, H, W), None where it reads features.
    """

    rows: Tensor
    labels: Tensor
    features: Tensor | None
    pixels: Tensor | None


class PromptLearner(nn.Module):
    """Learned tensors (the parameters) of a method, bound to a backbone and to C class names.

    Write `texts`, and `vision` where tokens enter the image tower; override `loss`, `images` or `logits` where the
    method has its own. Parameters get their start values in `__init__`, which may draw from torch's global stream;
    constants that need class names or texts are made there, too.

    Attributes:
        of: the method, whose hyper-parameters the learner reads.
        on_pixels: whether images are encoded by this learner and not by the frozen tower; true for all that write
            `vision` or `images`.
        linear: whether logits are those of cosines with the class features; false for all that write `logits`.
    """

    on_pixels: ClassVar[bool] = False
    linear: ClassVar[bool] = True

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.on_pixels = cls.on_pixels or not {"vision", "images"}.isdisjoint(vars(cls))
        cls.linear = cls.linear and "logits" not in vars(cls)

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__()
        self.of, self.backbone, self.class_names = of, backbone, list(class_names)
        self.logit_scale = backbone.logit_scale

    def texts(self) -> Tensor:
        """Unit features of the classes (C, D)."""
        raise NotImplementedError

    def vision(self) -> list[Insertion]:
        """Prompt tokens in the image tower; without any, features are those of the frozen tower."""
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
        """What a step minimises, and which images were recognised (B,): here cross-entropy."""
        logits = self.logits(self.seen(batch), self.texts())
        return cross_entropy(logits, batch.labels), logits.argmax(1) == batch.labels

    def seen(self, batch: Batch) -> Tensor:
        """The images' features (B, K), with gradients where tokens are in the image tower."""
        if batch.features is not None:
            return batch.features
        assert batch.pixels is not None
        return self.images(batch.pixels)


@dataclass(kw_only=True)
class PromptMethod(Method):
    """Base of the prompt methods: name the `learner`; hyper-parameters below get the values of the method's paper."""

    kind: ClassVar[str] = "prompts"
    learner: ClassVar[type[PromptLearner]]
    clip_norm: ClassVar[float | None] = None  # greatest norm of the whole gradient

    lr: float = hyper(2e-3, "SGD learning rate, momentum 0.9, weight decay 5e-4 (CoOp)", low=0)
    epochs: int | None = hyper(None, "passes over the support set; by default 50, 100 or 200 by shots (CoOp)", low=1)
    batch_size: int = hyper(32, "images a step (CoOp)", low=1)
    views: int = hyper(
        0, "random crops of each image, encoded once and used in turn (scale 0.08-1); 0: the image itself", low=0
    )
    seed: int = hyper(1, "initial values and order of the images")

    # -- learning ---------------------------------------------------------------------------------------------------

    def bind(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        """The method's learner at its start values, which may be drawn from torch's global stream (see `seeded`)."""
        try:
            return self.learner(self, backbone, class_names).to(backbone.device)
        except ClipadaptError as error:
            raise type(error)(f"{self.card.key}: {error}") from error

    def _learn(self, model: Backbone, data: TrainingData, run: Run) -> None:
        with seeded(self.seed):
            learner = self.bind(model, self.class_names_)
            self._train(learner, data, run)
        self.learned_: dict[str, Tensor] = {name: p.detach().cpu() for name, p in learner.named_parameters()}
        self._use(learner)

    def _train(self, learner: Any, data: TrainingData, run: Run, **more: Any) -> None:
        """The training of CoOp and its descendants: SGD, cosine by epoch, cross-entropy or the learner's own loss.

        `more` are further arguments of `train`.
        """
        epochs = self._epochs(data.support)
        steps = batches(len(data.support), self.batch_size, epochs=epochs, seed=self.seed)
        per_epoch = len(steps) // epochs
        batch_of = self._batches(learner.backbone, data)
        train(
            lambda step: learner.loss(batch_of(step[1], step[0] // per_epoch)),
            torch.optim.SGD(learner.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4),
            list(enumerate(steps)),
            schedule=lambda step: cosine_by_epoch(step, per_epoch, epochs, 1e-5 / self.lr if self.lr else 0.0),
            clip_norm=self.clip_norm,
            run=run,
            **more,
        )

    def _epochs(self, support: Any) -> int:
        shots = max(support.counts)
        return self.epochs or (50 if shots == 1 else 100 if shots <= 4 else 200)

    def _batches(self, backbone: Backbone, data: TrainingData) -> Callable[[Tensor, int], Batch]:
        """A function from (rows, epoch) to the batch: features encoded once, or pixels decoded when asked for."""
        support, labels = data.support, torch.as_tensor(self.labels.array(data.support), device=backbone.device)
        if self.learner.on_pixels:
            min_scale = getattr(self, "min_scale", 1.0)
            pixels = Pixels(backbone, support, min_scale=min_scale, seed=self.seed)
            return lambda rows, epoch: Batch(rows, labels[rows], None, pixels.batch(rows, epoch))
        encoded = encode_images(backbone, support, views=self.views, seed=self.seed, min_scale=0.08).features
        views = (encoded if encoded.ndim == 3 else encoded[:, None]).to(backbone.device)  # (N, V, D)
        return lambda rows, epoch: Batch(rows, labels[rows], views[rows, epoch % views.shape[1]], None)

    # -- predicting -------------------------------------------------------------------------------------------------

    def _use(self, learner: PromptLearner) -> None:
        """Predict with a learner that has learned."""
        self._bound = learner.requires_grad_(False)
        with torch.no_grad():
            self._texts = learner.texts()  # (C, D), encoded once

    def _restore(self, model: Any) -> None:
        self.backbone_ = model
        with seeded(self.seed):  # start values, which what was learned replaces
            learner = self.bind(model, self.class_names_)
        learner.load_state_dict({k: v.to(model.device) for k, v in self.learned_.items()}, strict=True)
        self._use(learner)

    def _reclassify(self, model: Any) -> None:
        self._restore(model)

    @property
    def encoder(self) -> Encoder:
        """See `Classifier.encoder`; where tokens are in the image tower, it is the prompted one."""
        backbone = self._model("it has no towers to encode with")
        if not self.learner.on_pixels:
            return backbone
        fingerprint = self._adapted_fingerprint(backbone, self.learned_)
        dim = self._bound.image_dim
        return Adapted(backbone, self._bound.images, dim, fingerprint, aligned=dim == backbone.dim)

    @property
    def head(self) -> Head | None:
        """See `Classifier.head`; it is linear where the learner's logits are cosines with its class features."""
        self._fitted("class_names_")
        weight = self._bound.logit_scale * self._texts.cpu() if self.learner.linear else None
        return Head(self._logits, weight)

    def _logits(self, images: Tensor) -> Tensor:
        return self._bound.logits(images.to(self._texts.device), self._texts).cpu()  # (N, C)

    @property
    def plain_texts(self) -> bool:
        """See `Classifier.plain_texts`."""
        return False

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """See `Classifier.encode_texts`: the texts take the place of class names in the learned prompt."""
        other: Any = copy.copy(self)
        other.class_names_ = list(texts)
        other._reclassify(self._fitted("backbone_"))
        features = other._texts
        if features.shape != (len(texts), self._bound.backbone.dim):
            raise ClipadaptError(
                f"{self.card.key} has no single text feature: its class features depend on the image or are several. "
                "Ask for one of the model's classes, or search without the model."
            )
        return features

    def encode_class(self, name: str) -> Tensor:
        """See `Classifier.encode_class`: the learned prompt takes the place of sentences."""
        return self.encode_texts([name])[0]
