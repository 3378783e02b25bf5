"""The one loop of few-shot training: batches, a loss, an optimiser, a schedule, reports, and resumption."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipadapt.training.checkpoint import load_progress, save_progress

SAVE_EVERY = 20.0  # seconds between two savings of a training run

Report = Callable[[dict[str, Any]], None]
Loss = Tensor | tuple[Tensor, Tensor]  # the loss; or the loss and which of the batch's examples were right (B,)


@dataclass
class Run:
    """How the training runs of one fit are watched, and where they are kept so that an interrupted fit goes on.

    report  called after each step with step, steps, loss, lr, seconds and, where the method knows, accuracy
    folder  one file for each call of `train` in the fit, in order; None keeps nothing
    every   seconds between two savings
    """

    report: Report | None = None
    folder: Path | None = None
    every: float = field(default_factory=lambda: SAVE_EVERY)
    calls: int = field(default=0, init=False)
    trained: int = field(default=0, init=False)  # numbers that the latest training run chose

    def next_file(self) -> Path | None:
        """Where the next training run of this fit is kept."""
        self.calls += 1
        return self.folder / f"run-{self.calls}.safetensors" if self.folder is not None else None


UNWATCHED = Run()


def batches(n: int, batch_size: int, *, epochs: int, seed: int) -> list[Tensor]:
    """Row numbers of every step: each epoch is a fresh permutation of range(n), cut into batches.

    A last batch that is smaller than `batch_size` is kept; with n <= batch_size each epoch is one full batch.
    """
    generator = torch.Generator().manual_seed(seed)
    return [rows for _ in range(epochs) for rows in torch.randperm(n, generator=generator).split(batch_size)]


def stream(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, whatever was drawn before it."""
    return torch.Generator().manual_seed(1_000_003 * seed + step)


def train(
    loss_of: Callable[[Any], Loss],
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Any],
    *,
    schedule: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    run: Run = UNWATCHED,
    after_step: Callable[[int], None] | None = None,
    state: Sequence[Tensor] = (),
) -> list[float]:
    """Minimise `loss_of(step)` over `steps`, mostly row numbers of batches; returns the loss of every step.

    `schedule(number)` is the factor on each group's learning rate at that step (constant where it is None);
    `clip_norm` is the greatest norm of the whole gradient. A run that `run` keeps goes on where it was interrupted,
    and ends bit for bit as it would have. Tensors that `after_step` changes in place belong in `state`: without them
    such a run is not kept.
    """
    base = [group["lr"] for group in optimizer.param_groups]
    run.trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    file = run.next_file() if after_step is None or state else None
    kept = [*(p for group in optimizer.param_groups for p in group["params"]), *state]
    losses, earlier = load_progress(file, kept, optimizer) if file is not None and file.exists() else ([], 0.0)
    start = saved = time.perf_counter()
    right: deque[float] = deque(maxlen=50)
    for number in range(len(losses), len(steps)):
        factor = schedule(number) if schedule is not None else 1.0
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad(set_to_none=True)
        result = loss_of(steps[number])
        loss, hits = result if isinstance(result, tuple) else (result, None)
        loss.backward()
        if clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"The loss became {losses[-1]} at step {number + 1}: lower the learning rate.")
        if after_step is not None:
            after_step(number)
        now = time.perf_counter()
        if run.report is not None:
            line = {"step": number + 1, "steps": len(steps), "loss": losses[-1], "lr": base[0] * factor}
            line["seconds"] = earlier + now - start
            if hits is not None:
                right.append(hits.float().mean().item())
                line["accuracy"] = sum(right) / len(right)  # of the latest 50 batches, while they were learned from
            run.report(line)
        if file is not None and (now - saved >= run.every or number + 1 == len(steps)):
            save_progress(file, kept, optimizer, losses, earlier + now - start)
            saved = time.perf_counter()
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr
    return losses


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global stream starts from `seed` inside and is put back afterwards, for layers that draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
