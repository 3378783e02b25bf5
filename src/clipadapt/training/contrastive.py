"""Contrastive pre-training of a CLIP from picture-text pairs (arXiv 2103.00020): one plain loop.

Exact shortcuts: text at its true length in the batch (the causal mask makes padding invisible to the end token); gradient
caching (arXiv 2101.06983), which trades a second forward pass for the memory of a large batch; global negatives across
processes. What changes the result is named in the recipe: bfloat16 autocast, and patch dropout (FLIP, arXiv 2212.00794).
Run it under `torchrun` or `accelerate launch` for several processes; the recipe's batch size is the global one.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, get_worker_info
from transformers import CLIPModel, PreTrainedTokenizerBase

from clipadapt.backbones.scratch import save_clip
from clipadapt.errors import ArtifactError, ClipadaptError, unknown_name
from clipadapt.losses.contrastive import info_nce
from clipadapt.training.averaging import EMA
from clipadapt.training.schedules import cosine

MAX_LOGIT_SCALE = 100.0  # CLIP's bound on exp(logit_scale): above it training becomes unstable
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class PairSource(Protocol):
    """Where picture-text pairs come from."""

    def batch(self, step: int, batch_size: int, image_size: int, seed: int) -> tuple[Any, list[str]]:
        """The batch of one step, a function of (seed, step) only: pixels (B, 3, S, S) and B texts.

        Pixels are uint8 RGB, or float32 already normalised; numpy or torch. Runs in a background process.
        """


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
    ema_decay: float = 0.999
    seed: int = 0  # of the order of the data and of patch dropout
    workers: int = 1  # background processes that prepare batches; 0: prepare them within the step
    log_every: int = 10  # steps
    evaluate_every: int = 200  # steps; 0: at the end only
    checkpoint_every: int = 200  # steps

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise unknown_name("precision", self.precision, ("bf16", "fp32"))
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
        if "betas" in recipe:
            recipe["betas"] = tuple(recipe["betas"])
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


# Batches ---------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """This process's share of one step."""

    pixels: Tensor  # (B, 3, S, S)
    ids: Tensor  # (B, L), L the longest text of the share
    keep: Tensor | None  # (B, K) indices of the patches that are seen; None: all

    def split(self, size: int) -> list[Batch]:
        keeps = [None] * len(self.ids) if self.keep is None else self.keep.split(size)
        return [Batch(*parts) for parts in zip(self.pixels.split(size), self.ids.split(size), keeps, strict=False)]

    def to(self, device: torch.device) -> Batch:
        keep = None if self.keep is None else self.keep.to(device, non_blocking=True)
        pixels = self.pixels.to(device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            mean, std = torch.tensor(PIXEL_MEAN, device=device), torch.tensor(PIXEL_STD, device=device)
            pixels = (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        return Batch(pixels, self.ids.to(device, non_blocking=True), keep)


@dataclass
class Batches(Dataset):
    """The batches of a run, by step: item `step` is the share of process `rank` of `world`, ready for the towers."""

    source: PairSource
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    image_size: int
    patches: int
    context_length: int
    rank: int
    world: int

    def __getitem__(self, step: int) -> Batch:
        size = self.recipe.batch_size
        share = slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)
        pixels, texts = self.source.batch(step, size, self.image_size, self.recipe.seed)
        tokens = self.tokenizer(
            texts[share], padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        keep = None
        if dropped := self.recipe.dropped_patches(step, self.patches):
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
            order = torch.rand(size, self.patches, generator=generator).argsort(dim=1)  # (B, N)
            keep = order[share, dropped:].contiguous()
        return Batch(torch.as_tensor(pixels[share]).contiguous(), tokens["input_ids"], keep)


def _in_worker(_: int) -> None:
    # A signal meant to end the run is the main process's to answer: it still needs the workers for its last step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# Towers ----------------------------------------------------------------------------------------------------------------


def image_features(model: CLIPModel, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
    """Unit-norm picture features (B, D) of the class token and, if given, only the patches `keep` (B, K)."""
    vision = model.vision_model
    hidden = vision.embeddings(pixels)  # (B, 1 + N, W)
    if keep is not None:
        kept = hidden[:, 1:].gather(1, keep[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, K, W)
        hidden = torch.cat([hidden[:, :1], kept], dim=1)  # (B, 1 + K, W)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    pooled = vision.post_layernorm(hidden[:, 0])  # (B, W)
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit-norm text features (B, D) of token ids (B, L)."""
    pooled = model.text_model(input_ids=ids).pooler_output  # (B, W)
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


class Towers(nn.Module):
    """A CLIPModel as DistributedDataParallel wants it: both towers in one forward pass.

    Its parameters are the model's own under the same names, except that the logit scale is a vector of one: sharded
    training (FSDP) refuses scalar parameters.
    """

    def __init__(self, model: CLIPModel, precision: str) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
        self.precision = precision

    def forward(self, pixels: Tensor, ids: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Picture features (B, D), text features (B, D), the multiplier of their cosines (1,)."""
        # Autocast begins here, not around the step: weights cast in a pass without gradients must not be reused.
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return image_features(self, pixels, keep), text_features(self, ids), self.logit_scale.exp()
