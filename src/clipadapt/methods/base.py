"""What every method is: a card, hyper-parameters, `fit`, and a fitted state that can be saved.

A method is a dataclass. Its fields are hyper-parameters; `fit` learns and returns self; what was learned is kept in
attributes that end in an underscore. Two bases make it complete: a task, which says what a fitted one answers
(`methods.tasks`), and a kind, which says how it learns (`methods.kinds`). Nothing here knows a class, an image or a
loss.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import safetensors.torch

from clipadapt.errors import ClipadaptError
from clipadapt.methods.artifact import learned, save
from clipadapt.methods.card import Card, check_hyperparameter, hyper, settings_of
from clipadapt.methods.recipe import recipe
from clipadapt.methods.training_data import TrainingData, why_not
from clipadapt.training.loop import Report, Run


@dataclass(kw_only=True)
class Method:
    """Base of all methods; see the module's docstring."""

    card: ClassVar[Card]
    # The values that `--method auto` tries, per hyper-parameter: the ranges that the method's paper searches.
    search_space: ClassVar[dict[str, Sequence[Any]]] = {}

    templates: Any = hyper("photo", "prompt templates of the class names: a set's name, template(s), file or mapping")

    if TYPE_CHECKING:  # a kind asks what only its task has, and the other way round
        kind: ClassVar[str]

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        for name, value in self.settings.items():
            check_hyperparameter(f"{self.card.key}: {name} = {value!r}", value, settings_of(self)[name].metadata)

    @classmethod
    def hyperparameters(cls) -> list[str]:
        """The names of its hyper-parameters."""
        return list(settings_of(cls))

    @property
    def settings(self) -> dict[str, Any]:
        """Its hyper-parameters and their values."""
        return {name: getattr(self, f.name) for name, f in settings_of(self).items()}

    # -- learning ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        backbone: Any,
        support: Any = None,
        *,
        unlabelled: Any = None,
        val: Any = None,
        class_names: Sequence[str] | None = None,
        task: str | None = None,
        report: Report | None = None,
        resume: str | Path | None = None,
    ) -> Self:
        """Learn from a labelled `support` set (or only from `class_names`, where the card's signal is "none").

        Args:
            backbone: the model to adapt; it stays as it is.
            support: labelled examples to learn from.
            unlabelled: images (paths, PIL, a data set, whose labels are not looked at) for methods whose card says
                that they use them; with these, `class_names` may stand for the support set.
            val: chooses hyper-parameters where the method's paper does so; nothing is ever trained on it.
            class_names: the classes, where no support set names them.
            task: the name of a step of a stream: a method whose card has `streams` goes on from what it has learned.
            report: called after every training step with a dict of step, steps, loss, lr, seconds and, for some
                methods, accuracy.
            resume: a folder where a training run keeps its state until it ends: the same call goes on where an
                interrupted one was, to the same result.

        Raises:
            ClipadaptError: the backbone lacks what the method requires, or the data do not suit it.
        """
        data = TrainingData.of(support, val, unlabelled, class_names, task)
        if task is not None:
            data = data.after(getattr(self, "class_names_", []))
        self._open(backbone, data)
        data = self._prepare(backbone, data)
        folder = Path(resume) / self._identity(backbone, data) if resume is not None else None
        run = Run(report, folder)
        self._learn(backbone, data, run)
        self.trained_ = run.trained
        self._close(data)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return self

    def _open(self, model: Any, data: TrainingData) -> None:
        """Refuse what cannot work, and remember what the method is fitted on."""
        reason = self.why_not(model, data)
        if reason is not None:
            raise ClipadaptError(reason)
        if data.task is None:
            self._forget()
        self.backbone_: Any = model
        self.origin_: dict[str, str] | None = None
        if model is not None:
            self.origin_ = {"source": model.source, "fingerprint": model.fingerprint}

    def _forget(self) -> None:
        """Drop what an earlier fit learned: only a step of a stream goes on from it."""
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)

    def why_not(self, model: Any = None, data: TrainingData | None = None, **needs: bool) -> str | None:
        """Why this method cannot run here, as one sentence, or None; see `training_data.why_not`."""
        return why_not(dataclasses.replace(self.card, signal=self._signal), model, data, **needs)

    @property
    def _signal(self) -> str:
        """What this method with these hyper-parameters learns from; see `Card.signal`."""
        return self.card.signal

    def _prepare(self, model: Any, data: TrainingData) -> TrainingData:
        """Other training data made of these, such as pseudo-labelled images; by default they stay as they are."""
        return data

    def _learn(self, model: Any, data: TrainingData, run: Run) -> None:
        """The kind's part of `fit`, on data that have been checked and prepared; by default nothing is learned."""
        self._restore(model)

    def _close(self, data: TrainingData) -> None:
        """The task's part of `fit`, once everything has been learned."""

    def _identity(self, model: Any, data: TrainingData) -> str:
        """What a training run depends on, as 32 hex digits."""
        facts = [recipe(self), model.fingerprint, data.contents, data.targets, data.class_names, data.task]
        digest = blake2b(json.dumps(facts, default=sorted).encode(), digest_size=16)
        if data.task is not None:
            tensors, plain = learned(self)
            digest.update(json.dumps(plain, default=sorted).encode() + safetensors.torch.save(tensors))
        return digest.hexdigest()

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def trained_parameters(self) -> int:
        """How many numbers gradient descent or a closed-form solver chose; 0 where a cache or names suffice."""
        return self._fitted("trained_")

    def _fitted(self, name: str) -> Any:
        if not hasattr(self, name):
            raise ClipadaptError(f"This {self.card.key} is not fitted yet: call fit or fit_features first.")
        return getattr(self, name)

    def _model(self, what: str) -> Any:
        """The model that it was fitted on, adapted or not; refuses `what` where it was fitted on features alone."""
        model = self._fitted("backbone_")
        if model is None:
            raise ClipadaptError(f"This {self.card.key} was fitted on features, so {what}.")
        return model

    # -- keeping ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write this fitted method as a small folder: config.json and safetensors, replaced as a whole."""
        self._fitted("origin_")
        return save(self, folder)

    def _restore(self, model: Any) -> None:
        """After loading: rebuild what was not saved from the model that it was fitted on (None: features alone)."""
        self.backbone_ = model
