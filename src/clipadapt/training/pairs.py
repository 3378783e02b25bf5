"""Batches of picture-text pairs: prepared by a background process, each training process its own share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from clipadapt.backbones.text import clean
from clipadapt.training.recipe import Recipe

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class PairSource(Protocol):
    """Where picture-text pairs come from."""

    def batch(self, step: int, batch_size: int, image_size: int, seed: int) -> tuple[Any, list[str]]:
        """The batch of one step, a function of (seed, step) only: pixels (B, 3, S, S) and B texts.

        Pixels are uint8 RGB, or float32 already normalised; numpy or torch. Called in a background process.
        """


class Batch(NamedTuple):
    """One process's share of a step."""

    pixels: Tensor  # (B, 3, S, S)
    ids: Tensor  # (B, L), L the longest text of the share
    keep: Tensor | None  # (B, K) indices of the patches that are seen; None: all

    def split(self, size: int) -> list[Batch]:
        """Consecutive parts of at most `size` pairs."""
        parts = (slice(start, start + size) for start in range(0, len(self.ids), size))
        return [Batch(self.pixels[p], self.ids[p], None if self.keep is None else self.keep[p]) for p in parts]

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, its pixels as the image tower takes them."""
        pixels, ids = self.pixels.to(device, non_blocking=True), self.ids.to(device, non_blocking=True)
        keep = None if self.keep is None else self.keep.to(device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
            pixels = (pixels - 255 * mean) / (255 * std)
        return Batch(pixels, ids, keep)


@dataclass
class Batches(Dataset):
    """The batches of a run by step: item `step` is the share of process `rank` of `world`, ready for the towers."""

    source: PairSource
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    image_size: int
    patches: int  # N of one picture
    context_length: int
    rank: int = 0
    world: int = 1

    def __getitem__(self, step: int) -> Batch:
        size, seed = self.recipe.batch_size, self.recipe.seed
        share = slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)
        pixels, texts = self.source.batch(step, size, self.image_size, seed)
        # Padded to the longest text of the share only; the causal mask hides padding from every end token.
        cleaned = [clean(text, self.tokenizer.all_special_tokens) for text in texts[share]]
        tokens = self.tokenizer(
            cleaned, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        keep = None
        if dropped := self.recipe.dropped_patches(step, self.patches):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            order = torch.rand(size, self.patches, generator=generator).argsort(dim=1)  # (B, N)
            keep = order[share, dropped:]
        return Batch(torch.as_tensor(pixels[share]), tokens["input_ids"], keep)

    def stream(self, first: int) -> Iterator[Batch]:
        """The batches of steps `first`, `first` + 1, … of the run, prepared ahead by the recipe's workers."""
        workers = self.recipe.workers
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, self.recipe.steps),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)


def _start_worker(_: int) -> None:
    # A signal that ends the run is answered by the main process, which still needs this one for the step under way.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork, and it would say so
