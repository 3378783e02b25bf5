"""Items with captions: images, or texts, and what is written about each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from clipadapt.data.examples import as_items
from clipadapt.data.items import Item
from clipadapt.errors import DataError


@dataclass(frozen=True, repr=False)
class Pairs:
    """Items and their captions, as parallel lists; captions are taken as they are.

    Attributes:
        items: N images, read lazily, or N texts for text-text pairs.
        captions: N tuples of one caption or more.
        name: what the pairs are called in messages and results.
    """

    items: list[Item] | list[str]
    captions: list[tuple[str, ...]]
    name: str = "pairs"

    def __post_init__(self) -> None:
        if len(self.items) != len(self.captions):
            raise DataError(f"{self.name}: {len(self.items)} items but captions of {len(self.captions)}.")
        for number, captions in enumerate(self.captions):
            if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
                raise DataError(f"{self.name}: item {number} needs captions that are not blank, not {captions!r}.")

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        kind = "texts" if self.items and isinstance(self.items[0], str) else "images"
        return f"Pairs({self.name!r}: {len(self)} {kind}, {len(self.texts)} captions)"

    @property
    def texts(self) -> list[str]:
        """The different captions, in the order of first use."""
        return list(dict.fromkeys(caption for captions in self.captions for caption in captions))

    def select(self, indices: Iterable[int]) -> Pairs:
        """The pairs at `indices`, in that order."""
        chosen = [int(i) for i in indices]
        items: Any = [self.items[i] for i in chosen]
        return Pairs(items, [self.captions[i] for i in chosen], self.name)


def image_pairs(pairs: Iterable[tuple[Any, str | Iterable[str]]], *, name: str = "pairs") -> Pairs:
    """Pairs from (image, caption) or (image, captions) tuples; images in any form `as_items` takes.

    Raises:
        DataError: there are no pairs, or one is something else.
    """
    images, captions = [], []
    for number, pair in enumerate(pairs):
        several = _captions(pair)
        if not several:
            raise DataError(f"{name}: pair {number} is not an image with a caption.")
        images.append(pair[0])
        captions.append(several)
    if not images:
        raise DataError(f"{name} holds no pairs.")
    return Pairs(as_items(images), captions, name)


def _captions(pair: Any) -> tuple[str, ...]:
    """Of an (image, caption or captions) tuple the captions; () if it is something else."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], str | tuple | list)):
        return ()
    captions = (pair[1],) if isinstance(pair[1], str) else tuple(pair[1])
    return captions if all(isinstance(caption, str) and caption.strip() for caption in captions) else ()
