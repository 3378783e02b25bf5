"""Methods that see only features: what the frozen towers make of images and class names, encoded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.features import encode_images
from clipadapt.methods.base import Method
from clipadapt.methods.tasks.classification import Array, unit
from clipadapt.methods.tasks.labels import threshold_for
from clipadapt.methods.training_data import TrainingData
from clipadapt.training.loop import Loss, Report, Run, batches, train
from clipadapt.training.schedules import cosine


@dataclass(frozen=True)
class Support:
    """What a feature method learns from: unit features, labels, and the classes' unit text features."""

    images: Tensor  # (N, D)
    labels: Tensor  # (N,) int64 in [0, C); (N, C) bool where an image can show several classes
    texts: Tensor  # (C, D)
    logit_scale: float
    val: tuple[Tensor, Tensor] | None = None  # (V, D), labels: for choosing hyper-parameters, never for training
    unlabelled: Tensor | None = None  # (U, D), for methods whose card has `unlabelled`
    extras: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # see `FeatureMethod.extras`

    @cached_property
    def one_hot(self) -> Tensor:
        if self.labels.ndim == 2:
            return self.labels.to(self.images.dtype)  # (N, C)
        return one_hot(self.labels, len(self.texts)).to(self.images.dtype)  # (N, C)

    @property
    def zero_shot(self) -> Tensor:
        """Zero-shot logits of the support itself."""
        return self.logit_scale * self.images @ self.texts.T  # (N, C)


class Plan(NamedTuple):
    """The length of a training run, for its schedule: all steps, steps an epoch, epochs."""

    total: int
    per_epoch: int
    epochs: int


def cosine_to_zero(step: int, plan: Plan) -> float:
    """Half a cosine over the whole run."""
    return cosine(step, plan.total)


@dataclass(kw_only=True)
class FeatureMethod(Method):
    """A method that sees only features: write `_fit(support, run)`, and `_logits(images)` if it is not linear.

    `extras` names further inputs that `fit_features` takes, with what they are; `_extras` makes them of a backbone.
    """

    kind: ClassVar[str] = "features"
    extras: ClassVar[Mapping[str, str]] = {}

    def _learn(self, model: Any, data: TrainingData, run: Run) -> None:
        extras = {**data.extras, **self._extras(model, data)}
        self._take(
            encode_images(model, data.support).features,
            self.labels.array(data.support),
            self._class_texts(model),
            model.logit_scale,
            None if data.val is None else (encode_images(model, data.val).features, self.labels.array(data.val)),
            None if data.unlabelled is None else encode_images(model, data.unlabelled).features,
            extras,
            run,
        )

    def _extras(self, model: Any, data: TrainingData) -> dict[str, Any]:
        """Further inputs of `_fit` by name, those that `fit_features` is given otherwise."""
        return {}

    def fit_features(
        self,
        image_features: Array,
        labels: Any,
        text_features: Array,
        logit_scale: float = 100.0,
        *,
        unlabelled: Array | None = None,
        val: tuple[Array, Any] | None = None,
        report: Report | None = None,
        **extras: Any,
    ) -> Self:
        """Learn from (N, D) image features, (N,) int labels and (C, D) text features; no backbone is needed.

        Args:
            image_features: (N, D), torch or numpy, unit or not.
            labels: (N,) ints; (N, C) bool make a multi-label model (see `fit`).
            text_features: (C, D), one row a class.
            logit_scale: the factor on cosines that belongs to the encoder.
            unlabelled: (U, D) features of images without labels, for methods whose card has it; then N may be 0.
            val: (features, labels) for choosing hyper-parameters.
            report: as in `fit`.
            extras: further inputs that this method takes (its class's `extras`), such as `negatives`.

        Raises:
            ClipadaptError: shapes do not fit, values are not finite, or the method needs other data.
        """
        for name in extras:
            if name not in self.extras:
                raise unknown_name(f"input of {self.card.key}.fit_features", name, self.extras)
        extras = {name: value for name, value in extras.items() if value is not None}
        self._forget()
        self.backbone_, self.origin_ = None, None
        self.class_names_ = [str(c) for c in range(len(text_features))]
        self._start(np.ndim(labels) == 2)
        run = Run(report)
        self._take(image_features, labels, text_features, float(logit_scale), val, unlabelled, extras, run)
        self.trained_ = run.trained
        if self.multi_label_:
            images, targets = (image_features, labels) if val is None else val
            scores = torch.as_tensor(self.logits(images)) if len(images) else None
            self.threshold_ = threshold_for(np.asarray(targets), scores)
        return self

    def _take(
        self,
        image_features: Array,
        labels: Any,
        text_features: Array,
        logit_scale: float,
        val: tuple[Array, Any] | None,
        unlabelled: Array | None,
        extras: Mapping[str, Any],
        run: Run,
    ) -> None:
        """Check and normalise what was given, and learn from it."""
        texts = unit(text_features, "text_features")
        images = unit(image_features, "image_features", dim=texts.shape[1])
        self.dim_ = texts.shape[1]
        if unlabelled is not None:
            unlabelled = unit(unlabelled, "unlabelled features", dim=self.dim_)
        self._check_counts(len(images), 0 if unlabelled is None else len(unlabelled))
        if val is not None:
            x = unit(val[0], "val features", dim=self.dim_)
            val = x, self.labels.checked(val[1], len(x), len(texts))
        labels = self.labels.checked(labels, len(images), len(texts))
        self._fit(Support(images, labels, texts, logit_scale, val, unlabelled, extras), run)

    def _check_counts(self, labelled: int, unlabelled: int) -> None:
        """As `why_not`, of features."""
        key, signal = self.card.key, self._signal
        if unlabelled and not self.card.unlabelled:
            raise ClipadaptError(f"{key} does not use unlabelled images.")
        if signal == "unlabelled" and not unlabelled:
            raise ClipadaptError(f"{key} learns from unlabelled images: give unlabelled=.")
        if signal == "labels" and not (labelled or unlabelled):
            raise ClipadaptError(f"{key} learns from labelled images, and there are none.")

    def _fit(self, support: Support, run: Run) -> None:
        """The method's own part: leave what was learned in attributes that end in an underscore."""
        raise NotImplementedError

    def _descend(
        self,
        loss_of: Callable[[Any], Loss],
        optimizer: torch.optim.Optimizer,
        support: Support,
        run: Run,
        *,
        schedule: Callable[[int, Plan], float] | None = cosine_to_zero,
        epochs: int | None = None,
        numbered: bool = False,
        every_epoch: bool = False,
    ) -> list[Tensor]:
        """Train on batches of rows of the support set, by the method's `batch_size`, `epochs` and `seed`.

        Args:
            loss_of: rows (B,) -> the loss; where `numbered`, (number of the step, rows).
            schedule: a factor on the learning rate from the step and the plan; None keeps the rate.
            epochs: instead of the hyper-parameter.
            every_epoch: keep what each epoch ends with.

        Returns:
            Where `every_epoch`, each parameter's values after all E epochs (E, ...); otherwise nothing.
        """
        hyper: Any = self
        passes = epochs or hyper.epochs
        steps: Sequence[Any] = batches(len(support.images), hyper.batch_size, epochs=passes, seed=hyper.seed)
        plan = Plan(len(steps), len(steps) // passes, passes)
        factor = None if schedule is None else (lambda step: schedule(step, plan))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        history = [p.new_zeros(passes, *p.shape) for p in parameters] if every_epoch else []

        def remember(step: int) -> None:
            if (step + 1) % plan.per_epoch == 0:
                for kept, p in zip(history, parameters, strict=True):
                    kept[step // plan.per_epoch] = p.detach()

        train(
            loss_of,
            optimizer,
            list(enumerate(steps)) if numbered else steps,
            schedule=factor,
            run=run,
            after_step=remember if every_epoch else None,
            state=history,
        )
        return history
