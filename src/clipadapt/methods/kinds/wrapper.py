"""Methods that wrap another one: what it learned is kept with theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from clipadapt.errors import ClipadaptError
from clipadapt.methods.base import Method
from clipadapt.methods.registry import create
from clipadapt.methods.training_data import TrainingData
from clipadapt.training.loop import Run


def unfitted(wrapper: Any) -> Any:
    """The method that `wrapper.method` names, new: the one that was given is never fitted.

    A key gets the wrapper's templates.
    """
    if isinstance(wrapper.method, str):
        return create(wrapper.method, templates=wrapper.templates)
    return replace(wrapper.method)


class Wrapper(Method):
    """Has a hyper-parameter `method`, a key or an unfitted method; write `_fit(model, data, run)`, which sets `inner_`.

    `inner_` is a list of fitted methods, which a saved model nests with their backbones.
    """

    kind: ClassVar[str] = "wrapper"
    inner_: list[Any]

    def _learn(self, model: Any, data: TrainingData, run: Run) -> None:
        self._fit(model, data, run)

    def _fit(self, model: Any, data: TrainingData, run: Run) -> None:
        """The method's own part: leave the wrapped method, fitted once or several times, in `inner_`."""
        raise NotImplementedError

    def _fit_inner(self, model: Any, support: Any, run: Run) -> Any:
        """The wrapped method, fitted; its training is reported, and kept until it ends, with this method's."""
        return self._unfitted().fit(model, support, report=run.report, resume=run.folder)

    def _unfitted(self) -> Any:
        """See `unfitted`."""
        return unfitted(self)

    @property
    def encoder(self) -> Any:
        """That of the wrapped method, the first one where there are several."""
        return self._fitted("inner_")[0].encoder

    @property
    def _scorer(self) -> Any:
        return self._fitted("inner_")[0]._scorer

    @property
    def head(self) -> Any:
        """That of the wrapped method, the first one where there are several."""
        return self._fitted("inner_")[0].head

    def each_logits(self, images: Any, **options: Any) -> tuple[list[Tensor], list[int]]:
        """Logits (M, C) of images on each backbone, and which of them they are; `options` of `image_logits`."""
        if isinstance(images, Tensor) and len(self._fitted("inner_")) > 1:
            raise ClipadaptError("Pixels are prepared for one backbone: give images to several.")
        each = [inner.image_logits(images, **options) for inner in self._fitted("inner_")]
        return [logits for logits, _ in each], each[0][1]
