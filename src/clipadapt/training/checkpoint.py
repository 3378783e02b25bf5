"""What a training run keeps on disk so that it can go on: its state in one file, and its log."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipadapt.errors import ArtifactError
from clipadapt.files import written_aside
from clipadapt.training.sharding import share, whole

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


def save_progress(
    file: Path,
    kept: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    seconds: float,
    *,
    write: bool = True,
) -> None:
    """Write a training run after some steps to one file, renamed into place when it is whole.

    The file holds the tensors `kept.{i}`, of the optimiser `state.{i}.{key}` of parameter i, the random stream, and
    the losses so far. Where tensors are shared out over processes all of these must call it, and one of them with
    `write`.
    """
    tensors = {f"kept.{i}": whole(tensor.detach()) for i, tensor in enumerate(kept)}
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"state.{i}.{key}"] = whole(torch.as_tensor(value))
    if not write:
        return
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        metadata = {"progress": json.dumps({"seconds": seconds})}
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside, metadata=metadata)


@torch.no_grad()
def load_progress(file: Path, kept: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> tuple[list[float], float]:
    """Restore, in place, what `save_progress` wrote; returns the losses so far and the seconds they took.

    Raises ArtifactError for a file that is damaged or was written by another run.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        with safe_open(file, framework="pt") as stored:
            progress, names = json.loads(stored.metadata()["progress"]), set(stored.keys())
            if len(kept) != sum(name.startswith("kept.") for name in names):
                raise ValueError(f"{len(kept)} tensors are asked for")
            for i, tensor in enumerate(kept):
                found = stored.get_tensor(f"kept.{i}")
                if found.shape != tensor.shape:
                    raise ValueError(f"tensor {i} is {tuple(found.shape)}, not {tuple(tensor.shape)}")
                tensor.copy_(share(found.to(tensor.device), tensor))
            for name in sorted(names):  # all processes in one order, as a share is dealt out to each of them
                kind, _, rest = name.partition(".")
                if kind == "state":
                    number, _, key = rest.partition(".")
                    parameter, value = parameters[int(number)], stored.get_tensor(name)
                    optimizer.state[parameter][key] = (
                        value if key == "step" else share(value.to(parameter.device), parameter)
                    )
            if "random" in names:
                torch.set_rng_state(stored.get_tensor("random"))
            if "random.cuda" in names and torch.cuda.is_available():
                torch.cuda.set_rng_state(stored.get_tensor("random.cuda"))
            # Before the one format, losses were in the header.
            losses = stored.get_tensor("losses").tolist() if "losses" in names else progress["losses"]
    except (SafetensorError, RuntimeError, TypeError, KeyError, IndexError, ValueError) as error:
        raise _unusable(file, error) from error
    return losses, progress["seconds"]


def renew_checkpoint(file: Path, names: Sequence[str]) -> None:
    """Rewrite a file in which `train_contrastive` once kept a run, by names of parameters, as `save_progress` does.

    names: of the optimiser's parameters, in its order; their averages follow them. Any other file is left as it is.
    Of the losses only the number is known. Raises ArtifactError as `load_progress` does.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            progress = json.loads(stored.metadata()["progress"])
            if "ema_updates" not in progress:
                return
            tensors = {"losses": torch.full((progress["step"],), math.nan, dtype=torch.float64)}
            for i, name in enumerate(names):
                tensors[f"kept.{i}"] = stored.get_tensor(f"weight.{name}")
                tensors[f"kept.{len(names) + i}"] = stored.get_tensor(f"average.{name}")
                tensors |= {f"state.{i}.{key}": stored.get_tensor(f"{key}.{name}") for key in ADAM_STATE}
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise _unusable(file, error) from error
    with written_aside(file) as aside:
        save_file(tensors, aside, metadata={"progress": json.dumps({"seconds": progress["seconds"]})})


def _unusable(file: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{file} is damaged or belongs to another run; remove it to train afresh ({error}).")


def rewind_log(file: Path, step: int) -> None:
    """Drop the lines of a JSON-lines log after `step`: the run will write them again."""
    if not file.exists():
        return
    lines: Iterable[str] = file.read_text(encoding="utf-8").splitlines(keepends=True)
    # A line without its end was cut off by the interruption.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with written_aside(file) as aside:
        aside.write_text("".join(kept), encoding="utf-8")
