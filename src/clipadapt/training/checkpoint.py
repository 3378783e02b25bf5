"""What a training run keeps on disk so that it can go on: its state in one file, and its log."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipadapt.errors import ArtifactError
from clipadapt.files import written_aside
from clipadapt.training.averaging import EMA

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    file: Path, module: nn.Module, ema: EMA, optimizer: torch.optim.AdamW, progress: dict[str, float]
) -> None:
    """Write weights, averages, optimiser state and `progress` (JSON in the header) to one file, renamed into place."""
    tensors: dict[str, Tensor] = {}
    for (name, parameter), average in zip(module.named_parameters(), ema.averages, strict=True):
        tensors[f"weight.{name}"], tensors[f"average.{name}"] = parameter.detach(), average
        for key in ADAM_STATE:
            tensors[f"{key}.{name}"] = optimizer.state[parameter][key]
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
                parameter.copy_(stored.get_tensor(f"weight.{name}"))
                average.copy_(stored.get_tensor(f"average.{name}"))
                optimizer.state[parameter] = {key: stored.get_tensor(f"{key}.{name}") for key in ADAM_STATE}
    except (SafetensorError, RuntimeError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{file} is damaged or belongs to another model; remove it to train afresh ({error})."
        ) from error
    ema.updates = progress.pop("ema_updates")
    return progress


def rewind_log(file: Path, step: int) -> None:
    """Drop the lines of a JSON-lines log that lie after `step`: the run will write them again."""
    if not file.exists():
        return
    lines: Iterable[str] = file.read_text(encoding="utf-8").splitlines(keepends=True)
    # A line without its end was cut off by the interruption.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with written_aside(file) as aside:
        aside.write_text("".join(kept), encoding="utf-8")
