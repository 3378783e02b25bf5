"""Pictures with a caption each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from clipadapt.data.examples import Dataset, as_items
from clipadapt.errors import DataError


@dataclass(frozen=True, repr=False)
class Pairs(Dataset):
    """Picture-caption pairs: a data set whose "classes" are the different captions, which are taken as they are."""

    def __repr__(self) -> str:
        return f"Pairs({self.name!r}: {len(self)} pictures, {len(self.class_names)} captions)"


def image_pairs(pairs: Iterable[tuple[Any, str]], *, name: str = "pairs") -> Pairs:
    """Pairs from (picture, caption) tuples; pictures in any form `as_items` takes.

    Raises:
        DataError: there is no pair, or one of them is something else.
    """
    pictures, captions = [], []
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], str) and pair[1].strip()):
            raise DataError(f"{name}: pair {number} is not a picture with a caption.")
        pictures.append(pair[0])
        captions.append(pair[1])
    if not pictures:
        raise DataError(f"{name} holds no pair.")
    label_of = {caption: label for label, caption in enumerate(dict.fromkeys(captions))}
    return Pairs(as_items(pictures), [label_of[caption] for caption in captions], list(label_of), None, name)
