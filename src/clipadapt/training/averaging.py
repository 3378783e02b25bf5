"""The old name of `averages.Average.beta`, for methods that still use it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from clipadapt.training.averages import Average


class BetaAverage(Average):
    """`averages.Average.beta`, whose `update` counts the steps from 1."""

    def __init__(self, parameters: Iterable[Tensor], beta: float, steps: int) -> None:
        vars(self).update(vars(Average.beta(parameters, beta, steps)))

    def update(self, step: int) -> None:
        super().update(step - 1)
