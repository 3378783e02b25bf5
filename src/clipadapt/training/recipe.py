"""The numbers of a contrastive pre-training run, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from clipadapt.errors import ClipadaptError, unknown_name


@dataclass(frozen=True)
class Recipe:
    """How to train; every number that shapes the result. `steps` may change when a run is continued."""

    steps: int  # length of the run; the schedule follows step / steps
    batch_size: int  # pairs per step over all processes
    learning_rate: float = 1e-3  # peak
    weight_decay: float = 0.1  # of weight matrices only
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup: int = 0  # steps of linear warm-up
    floor: float = 0.0  # learning rate at the end, as a share of the peak
    clip_norm: float = 1.0  # bound on the norm of the whole gradient
    patch_dropout: float = 0.0  # share of patches left out, in [0, 1)
    unmasked_tuning: float = 0.0  # share of the steps, at the end, that see every patch
    chunk: int | None = None  # pairs per forward pass with gradient caching, per process; None: the whole batch at once
    precision: str = "bf16"  # or "fp32"
    towers: str = "both"  # what learns; "text": the image tower is locked (LiT, arXiv 2111.07991)
    frozen: tuple[str, ...] = ()  # what else does not learn: beginnings of names of weights
    ema_decay: float = 0.999
    seed: int = 0  # of the order of the data and of patch dropout
    workers: int = 1  # background processes that prepare batches; 0: prepare them within the step
    log_every: int = 10  # steps
    evaluate_every: int = 200  # steps; 0: at the end only
    checkpoint_every: int = 200  # steps

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise unknown_name("precision", self.precision, ("bf16", "fp32"))
        if self.towers not in ("both", "text"):
            raise unknown_name("choice of towers", self.towers, ("both", "text"))
        if not 0 <= self.patch_dropout < 1:
            raise ClipadaptError(f"patch_dropout is a share of patches in [0, 1), not {self.patch_dropout}.")
        if self.steps < 1 or self.batch_size < 2:
            raise ClipadaptError("A recipe needs steps >= 1 and batch_size >= 2 (a lone pair has no negatives).")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from plain values; raises ClipadaptError naming an unknown or missing key."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown_name("key of a recipe", name, known)
        for name in ("steps", "batch_size"):
            if name not in values:
                raise ClipadaptError(f"The recipe lacks {name!r}.")
        recipe = dict(values)
        recipe |= {name: tuple(recipe[name]) for name in ("betas", "frozen") if name in recipe}
        return cls(**recipe)

    @classmethod
    def load(cls, file: str | Path) -> Recipe:
        """A recipe from a JSON file with the fields of this class as keys."""
        try:
            return cls.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise ClipadaptError(f"{file} is not a readable JSON recipe: {error}.") from error

    def dropped_patches(self, step: int, patches: int) -> int:
        """How many of `patches` are left out at `step`."""
        unmasked = step >= self.steps * (1 - self.unmasked_tuning)
        return 0 if unmasked else int(self.patch_dropout * patches)
