"""The one loop of few-shot training: batches, a loss, an optimiser, a schedule, and a report of each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def batches(n: int, batch_size: int, *, epochs: int, seed: int) -> list[Tensor]:
    """Row numbers of every step: each epoch is a fresh permutation of range(n), cut into batches.

    A last batch that is smaller than `batch_size` is kept; with n <= batch_size each epoch is one full batch.
    """
    generator = torch.Generator().manual_seed(seed)
    return [rows for _ in range(epochs) for rows in torch.randperm(n, generator=generator).split(batch_size)]


def train(
    loss_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: list[Tensor],
    *,
    schedule: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Minimise `loss_of(rows)` over `steps`, a list of row numbers for each step; returns the loss of every step.

    `schedule(step)` is the factor on each group's learning rate at that step (constant where it is None);
    `clip_norm` is the greatest norm of the whole gradient.
    """
    base = [group["lr"] for group in optimizer.param_groups]
    start = time.perf_counter()
    losses = []
    for step, rows in enumerate(steps):
        factor = schedule(step) if schedule is not None else 1.0
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(rows)
        loss.backward()
        if clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"The loss became {losses[-1]} at step {step + 1}: lower the learning rate.")
        if report is not None:
            seconds = time.perf_counter() - start
            report(
                {"step": step + 1, "steps": len(steps), "loss": losses[-1], "lr": base[0] * factor, "seconds": seconds}
            )
        if after_step is not None:
            after_step(step)
    return losses


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global stream starts from `seed` inside and is put back afterwards, for layers that draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
