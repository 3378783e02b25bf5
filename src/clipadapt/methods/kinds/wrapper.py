"""Methods that wrap another one: what it learned is kept with theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

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
