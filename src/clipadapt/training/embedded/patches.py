"""Patches that have passed the trunk, kept: several random views of each drawing and photo that is trained on.

The trunk does not learn, and it is most of the work: with its patches kept, training costs a tenth. A folder gets

    patches.npy   (R, W, h, w) float16
    views.npy     (R, 2) int: the image (a number in the corpus, or -1 - k for photo k) and which view of it
    done.npy      which chunks are there, so that an interrupted run goes on
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipadapt.backbones import Backbone
from clipadapt.data.corpus.pairs import Corpus, augment
from clipadapt.errors import DataError
from clipadapt.features.views import RandomView
from clipadapt.files import written_aside

CHUNK = 512  # rows
SEED = 0  # of all views
PHOTO_SCALE = 0.35  # a view of a photo shows at least this share of it
_FILES = ("patches.npy", "views.npy", "done.npy")


@dataclass(frozen=True)
class KeptPatches:
    """An open folder of kept patches."""

    patches: np.ndarray  # (R, W, h, w) float16
    views: np.ndarray  # (R, 2)

    @classmethod
    def open(cls, folder: Path) -> KeptPatches:
        """Raises `DataError` when `folder` does not hold all of them."""
        if any(not (folder / name).exists() for name in _FILES) or not np.load(folder / "done.npy").all():
            raise DataError(f"{folder} holds no whole set of patches; make it with: clipadapt pretrain prepare.")
        return cls(np.load(folder / "patches.npy", mmap_mode="r"), np.load(folder / "views.npy"))


def keep_patches(
    backbone: Backbone,
    corpus: Corpus,
    photos: Sequence[Path],
    folder: Path,
    *,
    views: int = 1,
    photo_views: int = 16,
    report: Callable[[str], None] = print,
) -> None:
    """Keep `views` of each drawing of the training split and `photo_views` of each photo in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(index, view) for view in range(views) for index in corpus.select("train")]
    wanted += [(-1 - photo, view) for photo in range(len(photos)) for view in range(photo_views)]
    rows = np.array(wanted, np.int32)
    side = backbone.image_size[0]
    shape = (len(rows), backbone.width("vision"), side // backbone.patch_size, side // backbone.patch_size)
    chunks = -(-len(rows) // CHUNK)
    if not (folder / "done.npy").exists():
        np.lib.format.open_memmap(folder / "patches.npy", "w+", dtype=np.float16, shape=shape).flush()
        np.save(folder / "views.npy", rows)
        np.save(folder / "done.npy", np.zeros(chunks, bool))
    done = np.load(folder / "done.npy")
    if len(done) != chunks or not np.array_equal(np.load(folder / "views.npy"), rows):
        raise DataError(f"{folder} holds the patches of other images or views; give a new folder.")
    patches = np.lib.format.open_memmap(folder / "patches.npy", "r+")
    photo = lru_cache(1)(lambda number: Image.open(photos[number]).convert("RGB"))  # its views follow each other
    for chunk in np.flatnonzero(~done):
        part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        rng = np.random.default_rng([SEED, int(chunk)])
        patches[part] = passed(backbone, _views(corpus, photo, rows[part], side, rng))
        patches.flush()
        done[chunk] = True
        with written_aside(folder / "done.npy") as aside, aside.open("wb") as file:
            np.save(file, done)
        if chunk % 10 == 0:
            report(f"{int(done.sum()) * CHUNK:,} of {len(rows):,} views")


@torch.no_grad()
def passed(backbone: Backbone, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, S, S) uint8 -> their patches (B, W, h, w) float16, on the CPU."""
    transform: Any = backbone.preprocess
    return torch.cat([backbone.encode_patches(transform.of_bytes(part)).half().cpu() for part in pixels.split(32)])


def _views(
    corpus: Corpus, photo: Callable[[int], Image.Image], rows: np.ndarray, side: int, rng: np.random.Generator
) -> torch.Tensor:
    """A random view of each row's image: (B, 3, side, side) uint8."""
    out = torch.empty(len(rows), 3, side, side, dtype=torch.uint8)
    drawn = np.flatnonzero(rows[:, 0] >= 0)
    if len(drawn):
        indices = rows[drawn, 0]
        scenes = np.array([corpus.pairs[index]["kind"] == "playground" for index in indices])
        out[drawn] = augment(corpus.images[indices], scenes, side, rng)
    for place in np.flatnonzero(rows[:, 0] < 0):
        number, view = -1 - int(rows[place, 0]), RandomView(int(rows[place, 1]), SEED, PHOTO_SCALE)
        out[place] = torch.from_numpy(np.array(view.of(photo(number), str(number), (side, side)))).permute(2, 0, 1)
    return out
