"""What a training run keeps on disk so that it can go on: its state in one file, and its log."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipadapt.errors import ArtifactError
from clipadapt.files import written_aside
from clipadapt.training.averaging import EMA
from clipadapt.training.sharding import share, whole

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    file: Path,
    module: nn.Module,
    ema: EMA,
    optimizer: torch.optim.AdamW,
    progress: dict[str, float],
    *,
    write: bool = True,
) -> None:
    """Write weights, averages, optimiser state and `progress` (JSON in the header) to one file, renamed into place.

    Where they are shared out over processes all of these must call it, and one of them with `write`.
    """
    tensors: dict[str, Tensor] = {}
    for (name, parameter), average in zip(module.named_parameters(), ema.averages, strict=True):
        tensors[f"weight.{name}"], tensors[f"average.{name}"] = whole(parameter.detach()), whole(average)
        for key in ADAM_STATE:
            tensors[f"{key}.{name}"] = whole(optimizer.state[parameter][key])
    if not write:
        return
    with written_aside(file) as aside:
        save_file(tensors, aside, metadata={"progress": json.dumps({**progress, "ema_updates": ema.updates})})


@torch.no_grad()
def load_checkpoint(file: Path, module: nn.Module, ema: EMA, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Restore the state that `save_checkpoint` wrote, in place; returns the progress.

    Raises ArtifactError for a file that is damaged or was written for another model.
    """
    parameters = dict(module.named_parameters())
    device = next(iter(parameters.values())).device
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            progress = json.loads(stored.metadata()["progress"])
            for (name, parameter), average in zip(parameters.items(), ema.averages, strict=True):
                parameter.copy_(share(stored.get_tensor(f"weight.{name}"), parameter))
                average.copy_(share(stored.get_tensor(f"average.{name}"), average))
                kept = {key: stored.get_tensor(f"{key}.{name}") for key in ADAM_STATE}
                optimizer.state[parameter] = {k: v if k == "step" else share(v, parameter) for k, v in kept.items()}
    except (SafetensorError, RuntimeError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{file} is damaged or belongs to another model; remove it to train afresh ({error})."
        ) from error
    ema.updates = progress.pop("ema_updates")
    return progress


def save_progress(
    file: Path, kept: Sequence[Tensor], optimizer: torch.optim.Optimizer, losses: list[float], seconds: float
) -> None:
    """Write a few-shot run after some steps: tensors, optimiser state, the random stream, and the losses so far."""
    tensors = {f"kept.{i}": tensor.detach() for i, tensor in enumerate(kept)}
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"state.{i}.{key}"] = torch.as_tensor(value)
    file.parent.mkdir(parents=True, exist_ok=True)
    progress = json.dumps({"losses": losses, "seconds": seconds})
    with written_aside(file) as aside:
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside, metadata={"progress": progress})


@torch.no_grad()
def load_progress(file: Path, kept: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> tuple[list[float], float]:
    """Restore, in place, what `save_progress` wrote; returns the losses so far and the seconds they took.

    Raises ArtifactError for a file that is damaged or was written by another run.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        with safe_open(file, framework="pt") as stored:
            progress = json.loads(stored.metadata()["progress"])
            for i, tensor in enumerate(kept):
                tensor.copy_(stored.get_tensor(f"kept.{i}"))
            for name in stored.keys():  # noqa: SIM118 - no mapping
                kind, _, rest = name.partition(".")
                if kind == "state":
                    number, _, key = rest.partition(".")
                    parameter, value = parameters[int(number)], stored.get_tensor(name)
                    optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
            torch.set_rng_state(stored.get_tensor("random"))
            if "random.cuda" in stored.keys() and torch.cuda.is_available():  # noqa: SIM118
                torch.cuda.set_rng_state(stored.get_tensor("random.cuda"))
    except (SafetensorError, RuntimeError, TypeError, KeyError, IndexError, ValueError) as error:
        raise ArtifactError(f"{file} is damaged or belongs to another run; remove it to train afresh.") from error
    return progress["losses"], progress["seconds"]


def rewind_log(file: Path, step: int) -> None:
    """Drop the lines of a JSON-lines log that lie after `step`: the run will write them again."""
    if not file.exists():
        return
    lines: Iterable[str] = file.read_text(encoding="utf-8").splitlines(keepends=True)
    # A line without its end was cut off by the interruption.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with written_aside(file) as aside:
        aside.write_text("".join(kept), encoding="utf-8")
