"""Averages of weights along a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from clipadapt.training.sharding import whole


class Average:
    """A running average of tensors, average <- average + share (tensor - average), from where they are now.

    All that changes is `averages`, in place: as the `state` of `train`, an interrupted run goes on with them.

    Args:
        parameters: the tensors to follow, read now and at each `update`.
        share: of the n-th update, n = 1, 2, ..., the share in [0, 1] that the present tensors get.
        every: steps from one update to the next.
        summed: begin with zeros and add share * tensor instead, for shares that are known to sum to 1.
    """

    def __init__(
        self, parameters: Iterable[Tensor], share: Callable[[int], float], every: int = 1, *, summed: bool = False
    ) -> None:
        self.parameters = list(parameters)
        self.share, self.every, self.summed = share, every, summed
        self.averages = [torch.zeros_like(p) if summed else p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the tensors in after step number `step`, counted from 0 as `train` does."""
        number, rest = divmod(step + 1, self.every)
        if rest:
            return
        share = self.share(number)
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            if self.summed:
                average.add_(parameter, alpha=share)
            else:
                average.lerp_(parameter, share)

    @torch.no_grad()
    def copy_to(self, targets: Iterable[Tensor]) -> None:
        """Write the averages into `targets`, in the order of `parameters`; shapes may differ by dimensions of 1."""
        for average, target in zip(self.averages, targets, strict=True):
            target.copy_(whole(average).reshape(target.shape))

    @classmethod
    def running(cls, parameters: Iterable[Tensor], keep: float) -> Average:
        """average <- keep * average + (1 - keep) * parameter, with `keep` in [0, 1]."""
        return cls(parameters, lambda number: 1 - keep)

    @classmethod
    def ema(cls, parameters: Iterable[Tensor], decay: float) -> Average:
        """`running` with a decay that warms up: min(decay, (1 + n) / (10 + n)) at update n, `decay` in [0, 1).

        The random start is soon forgotten and the average is usable early; later its window is 1 / (1 - decay) updates.
        """
        return cls(parameters, lambda number: 1 - min(decay, (1 + number) / (10 + number)))

    @classmethod
    def beta(cls, parameters: Iterable[Tensor], sharpness: float, steps: int) -> Average:
        """The mean along a whole run of T steps, start included, weighted by a symmetric Beta density.

        average = sum_t a_t parameter_t / sum_t a_t        a_t = Beta(b, b) density at (t + 0.5) / (T + 1), t = 0..T

        t = 0 is the start, before the first step. With b < 1 both ends of the run count most, with 1 all of it evenly,
        with b > 1 its middle ("Beta moving average" of CLIPood, arXiv 2302.00864). `sharpness` is b > 0, `steps` is T.
        """
        place = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / (steps + 1)
        weights = (place * (1 - place)) ** (sharpness - 1)  # (T + 1,), up to a constant factor
        return cls(parameters, lambda number: float(weights[number] / weights[: number + 1].sum()))

    @classmethod
    def gaussian(cls, parameters: Iterable[Tensor], mean: float, std: float, epochs: int, per_epoch: int) -> Average:
        """The mean over the ends of the epochs e = 1 .. N, weighted by exp(-(e - mean)^2 / 2 std^2), without the start.

        "Gaussian weighted prompt aggregation" of PromptSRC (arXiv 2307.06948). Before the last epoch it is a part of
        the sum. `std` is > 0, in epochs; `per_epoch` is the number of steps of one.
        """
        weights = gaussian_weights(epochs, mean, std)
        return cls(parameters, lambda number: weights[number - 1].item(), per_epoch, summed=True)


def gaussian_weights(epochs: int, mean: float, std: float) -> Tensor:
    """The weight of each epoch 1 .. N in the average, (N,) float64 with sum 1."""
    distance = (torch.arange(1, epochs + 1, dtype=torch.float64) - mean) / std
    return (-distance.square() / 2).softmax(0)
