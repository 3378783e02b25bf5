"""Averages of weights along a training run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from clipadapt.training.sharding import whole


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
            target.copy_(whole(average).reshape(target.shape))


class BetaAverage:
    """Average of the parameters along a whole run, weighted by a symmetric Beta density over its T steps.

    average = sum_t a_t parameter_t / sum_t a_t        a_t = Beta(beta, beta) density at (t + 0.5) / (T + 1), t = 0..T

    t = 0 is the start, before the first step. With beta < 1 both ends of the run count most, with 1 all of it evenly,
    with beta > 1 its middle ("Beta moving average" of CLIPood, arXiv 2302.00864). Only the average so far is kept.

    parameters: the tensors to follow, read at once (t = 0) and at each `update`. beta: > 0. steps: T.
    """

    def __init__(self, parameters: Iterable[Tensor], beta: float, steps: int) -> None:
        self.parameters = list(parameters)
        self.averages = [p.detach().clone() for p in self.parameters]
        place = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / (steps + 1)
        self.weights = (place * (1 - place)) ** (beta - 1)  # (T + 1,), up to a constant factor

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters in after step number `step`, 1 to T; to be called once for each, in order."""
        share = float(self.weights[step] / self.weights[: step + 1].sum())
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter, share)
