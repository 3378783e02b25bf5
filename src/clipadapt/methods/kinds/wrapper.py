"""Methods that wrap another one: what it learned is kept with theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from clipadapt.methods.base import Method
from clipadapt.methods.registry import create


def unfitted(wrapper: Any) -> Any:
    """The method that `wrapper.method` names, new: the one that was given is never fitted.

    A key gets the wrapper's templates.
    """
    if isinstance(wrapper.method, str):
        return create(wrapper.method, templates=wrapper.templates)
    return replace(wrapper.method)


class Wrapper(Method):
    """Has a hyper-parameter `method`, a key or an unfitted method; what is fitted of it goes into `inner_`.

    `inner_` is a list of fitted methods, which a saved model nests with their backbones.
    """

    kind: ClassVar[str] = "wrapper"
    inner_: list[Any]

    def _unfitted(self) -> Any:
        """See `unfitted`."""
        return unfitted(self)
