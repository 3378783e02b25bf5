"""The one training loop: batches, a loss, an optimiser, a schedule, reports, and resumption."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clipadapt.training.checkpoint import load_progress, save_progress
from clipadapt.training.objective import Terms, total

SAVE_EVERY = 20.0  # seconds between two savings of a training run

Report = Callable[[dict[str, Any]], None]
Loss = Terms | tuple[Terms, Tensor]  # the loss; or the loss and which of the batch's examples were right (B,)


@runtime_checkable
class Stream(Protocol):
    """Steps that are prepared while others are taken."""

    def __len__(self) -> int: ...

    def stream(self, first: int) -> Iterator[Any]:
        """The steps from number `first` on."""


@dataclass
class Run:
    """How the training runs of one fit are watched, and where they are kept so that an interrupted fit goes on.

    report   called after each step with step, steps, loss, lr, seconds and, where they are known, accuracy and terms
    folder   one file for each call of `train` in the fit, in order; None keeps nothing
    every    seconds between two savings
    trained  how many numbers the latest call of `train` trained
    stopped  to be set by `report`: leave after this step, as if the run were interrupted
    """

    report: Report | None = None
    folder: Path | None = None
    every: float = field(default_factory=lambda: SAVE_EVERY)
    calls: int = field(default=0, init=False)
    trained: int = field(default=0, init=False)
    stopped: bool = field(default=False, init=False)

    def next_file(self) -> Path | None:
        """Where the next training run of this fit is kept."""
        self.calls += 1
        return self.folder / f"run-{self.calls}.safetensors" if self.folder is not None else None

    def begin(self, first: int) -> None:
        """Called before the steps, of which `first` were taken before an interruption."""

    def due(self, step: int, last: bool, seconds: float) -> bool:
        """Whether the run is saved after `step` (from 1), `seconds` after the latest saving."""
        return last or seconds >= self.every

    def save(self, file: Path, kept: Sequence[Tensor], optimizer: torch.optim.Optimizer, *progress: Any) -> None:
        """Keep the run's state in `file`; the arguments are those of `save_progress`."""
        save_progress(file, kept, optimizer, *progress)


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
    steps: Sequence[Any] | Stream,
    *,
    schedule: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    run: Run = UNWATCHED,
    after_step: Callable[[int], None] | None = None,
    state: Sequence[Tensor] = (),
) -> list[float]:
    """Minimise `loss_of(step)` over `steps`; returns the loss of every step.

    A run that `run` keeps goes on where it was interrupted, and ends bit for bit as it would have.

    Args:
        loss_of: the loss of a step, or its terms by name, alone or with which examples were right (see `Loss`). It may
            leave the gradients in the parameters itself, and give the loss without a graph.
        optimizer: of the parameters that are trained.
        steps: mostly row numbers of batches.
        schedule: the factor on each group's learning rate at a step, from 0; constant where it is None.
        clip_norm: the greatest norm of the whole gradient.
        run: reports and files.
        after_step: called with the step's number, from 0, when the parameters have moved.
        state: the tensors that `after_step` changes, all of them and in place. Without them such a run is not kept.

    Raises:
        FloatingPointError: the loss is not finite.
        ArtifactError: the file of the run is damaged or belongs to another run.
    """
    base = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    run.trained = sum(p.numel() for p in parameters)
    file = run.next_file() if after_step is None or state else None
    kept = [*parameters, *state]
    losses, earlier = load_progress(file, kept, optimizer) if file is not None and file.exists() else ([], 0.0)
    run.begin(len(losses))
    start = saved = time.perf_counter()
    right: deque[float] = deque(maxlen=50)
    with closing(_from(steps, len(losses))) as ahead:
        for number, step in enumerate(ahead, start=len(losses)):
            factor = schedule(number) if schedule is not None else 1.0
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
            optimizer.zero_grad(set_to_none=True)
            result = loss_of(step)
            terms, hits = result if isinstance(result, tuple) else (result, None)
            loss = total(terms)
            if loss.requires_grad or all(p.grad is None for p in parameters):
                loss.backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"The loss became {losses[-1]} at step {number + 1}: lower the learning rate.")
            if after_step is not None:
                after_step(number)
            now = time.perf_counter()
            if run.report is not None:
                line: dict[str, Any] = {"step": number + 1, "steps": len(steps), "loss": losses[-1]}
                line |= {"lr": base[0] * factor, "seconds": earlier + now - start}
                if isinstance(terms, dict):
                    line["terms"] = {name: term.item() for name, term in terms.items()}
                if hits is not None:
                    right.append(hits.float().mean().item())
                    line["accuracy"] = sum(right) / len(right)  # of the latest 50 batches, while they were learned from
                run.report(line)
            if file is not None and run.due(number + 1, number + 1 == len(steps), now - saved):
                run.save(file, kept, optimizer, losses, earlier + now - start)
                saved = time.perf_counter()
            if run.stopped:
                break
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr
    return losses


def _from(steps: Sequence[Any] | Stream, first: int) -> Generator[Any]:
    if isinstance(steps, Stream):
        yield from steps.stream(first)
    else:
        yield from (steps[number] for number in range(first, len(steps)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global stream starts from `seed` inside and is put back afterwards, for layers that draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
