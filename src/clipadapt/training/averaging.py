"""Averages of weights along a training run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class EMA:
    """Exponential moving average of parameters: average <- d * average + (1 - d) * parameter.

    The decay warms up, d = min(decay, (1 + t) / (10 + t)) at update t, so that the random start is soon forgotten and
    the average is usable early; later the window is 1 / (1 - decay) updates.

    parameters: the tensors to follow, read again at each `update`. decay: in [0, 1).
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards its parameter; call once after each optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def copy_to(self, targets: Iterable[Tensor]) -> None:
        """Write the averages into `targets`, in the order of `parameters`; shapes may differ by dimensions of 1."""
        for average, target in zip(self.averages, targets, strict=True):
            target.copy_(average.reshape(target.shape))
