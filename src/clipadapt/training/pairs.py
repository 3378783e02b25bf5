"""Batches of matched items: prepared by a background process, each training process its own share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from clipadapt.backbones.preprocess import OPENAI_MEAN, OPENAI_STD
from clipadapt.backbones.text import clean
from clipadapt.data import Pairs
from clipadapt.errors import ClipadaptError
from clipadapt.training.loop import stream
from clipadapt.training.recipe import Recipe


class PairSource(Protocol):
    """Where image-text pairs come from."""

    def batch(
        self, step: int, batch_size: int, image_size: int, seed: int
    ) -> tuple[Any, list[str]] | Mapping[str, Any]:
        """The batch of one step, a function of (seed, step) only: named streams of B entries each.

        images  (B, 3, S, S), uint8 RGB or float32 already normalised; they go through the image tower
        texts   B strings, or B lists of K strings each; they go through the text tower
        others  arrays (B, ...), such as stored features or `groups`; the objective gets them as they are

        Names are those of `training.objective`. A pair (images, texts) stands for {"image": images, "text": texts}.
        Arrays are numpy's or torch's. Called in a background process.
        """


class DrawnPairs:
    """The batches of a set of images with captions: each epoch in a fresh order, and of several captions one is drawn.

    What is left of an epoch after its last whole batch is not seen in it.
    """

    def __init__(self, pairs: Pairs, preprocess: Callable[[Any], Tensor]) -> None:
        self._pairs, self._preprocess = pairs, preprocess

    def batch(self, step: int, batch_size: int, image_size: int, seed: int) -> tuple[Tensor, list[str]]:
        """See `PairSource`; images have the size that `preprocess` gives them."""
        a_pass = len(self._pairs) // batch_size
        if not a_pass:
            raise ClipadaptError(f"{self._pairs!r} are fewer than the {batch_size} of a batch; lower batch_size.")
        epoch, place = divmod(step, a_pass)
        order = torch.randperm(len(self._pairs), generator=stream(seed, epoch))
        rows = order[place * batch_size : (place + 1) * batch_size].tolist()
        shares = torch.rand(batch_size, generator=stream(seed + 1, step)).tolist()
        captions = [self._pairs.captions[row] for row in rows]
        texts = [several[int(share * len(several))] for several, share in zip(captions, shares, strict=True)]
        items: list[Any] = [self._pairs.items[row] for row in rows]
        return torch.stack([self._preprocess(item.open()) for item in items]), texts


class Batch(NamedTuple):
    """One process's share of a step: streams by name."""

    images: dict[str, Tensor]  # (B, 3, S, S)
    ids: dict[str, Tensor]  # (B, L) or (B, K, L), L the longest text of the share
    given: dict[str, Tensor]  # (B, ...)
    keep: Tensor | None = None  # (B, P) indices of the patches that are seen; None: all

    @property
    def size(self) -> int:
        """How many items it holds."""
        return len(next(iter((self.images | self.ids | self.given).values())))

    def split(self, size: int) -> list[Batch]:
        """Consecutive parts of at most `size` items."""
        parts = (slice(start, start + size) for start in range(0, self.size, size))
        return [self._each(itemgetter(part)) for part in parts]

    def to(
        self, device: torch.device, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD
    ) -> Batch:
        """The batch on `device`; bytes become what an image tower takes that was trained with `mean` and `std`."""
        batch = self._each(lambda rows: rows.to(device, non_blocking=True))
        centre, spread = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        images = {
            name: (pixels - 255 * centre) / (255 * spread) if pixels.dtype == torch.uint8 else pixels
            for name, pixels in batch.images.items()
        }
        return batch._replace(images=images)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        images, ids, given = ({n: change(rows) for n, rows in part.items()} for part in self[:3])
        return Batch(images, ids, given, None if self.keep is None else change(self.keep))


@dataclass
class Batches(Dataset):
    """The batches of a run by step: item `step` is the share of process `rank` of `world`, ready for the towers."""

    source: PairSource
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    image_size: int
    patches: int  # N of one image
    context_length: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> Batch:
        size, seed = self.recipe.batch_size, self.recipe.seed
        share = slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)
        drawn = self.source.batch(step, size, self.image_size, seed)
        streams = drawn if isinstance(drawn, Mapping) else dict(zip(("image", "text"), drawn, strict=True))
        batch = Batch({}, {}, {})
        for name, values in streams.items():
            part = values[share]
            if isinstance(part, list):
                batch.ids[name] = self._ids(name, part)
            else:
                rows = torch.as_tensor(part)
                (batch.images if rows.ndim == 4 else batch.given)[name] = rows
        if batch.images and (dropped := self.recipe.dropped_patches(step, self.patches)):
            order = torch.rand(size, self.patches, generator=stream(seed, step)).argsort(dim=1)  # (B, N)
            batch = batch._replace(keep=order[share, dropped:])
        return batch

    def _ids(self, name: str, texts: list[str] | list[list[str]]) -> Tensor:
        """Token ids (B, L), or (B, K, L) of K texts an item.

        Padded to the longest text only; the mask of the text tower hides padding.
        """
        count = {1 if isinstance(each, str) else len(each) for each in texts}
        if len(count) > 1:
            raise ClipadaptError(f"Each item of {name!r} needs equally many texts, not {min(count)} to {max(count)}.")
        flat = [each for each in texts if isinstance(each, str)] or [text for each in texts for text in each]
        cleaned = [clean(text, self.tokenizer.all_special_tokens) for text in flat]
        tokens = self.tokenizer(
            cleaned, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        ids = tokens["input_ids"]
        return ids if isinstance(texts[0], str) else ids.unflatten(0, (len(texts), -1))

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
        ahead = iter(loader)
        try:
            yield from ahead
        finally:
            if workers:  # an error's traceback holds the iterator; and the workers ignore the signal that ends children
                ahead._shutdown_workers()  # type: ignore[attr-defined]


def _start_worker(_: int) -> None:
    # A signal that ends the run is answered by the main process, which still needs this one for the step under way.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork, and it would say so
