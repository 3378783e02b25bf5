"""Both towers together: drawings and photos by their names, with what the towers know already held fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from clipadapt.data.corpus.pairs import Corpus
from clipadapt.data.corpus.wordnet import Sense
from clipadapt.losses.contrastive import contrast
from clipadapt.training.embedded.lessons import Lessons, templated
from clipadapt.training.embedded.patches import KeptPatches
from clipadapt.training.embedded.teacher import unit

PHOTOS = 0.25  # share of photos in a batch
NEAR_IMAGE, NEAR_TEXT = 4.0, 2.0  # weights of holding fast


class Together:
    """A source of batches (`training.pairs.PairSource`): kept patches of an image, and one of its texts.

    A photo is held to the mean of its patches, a text to the direction that its name was taught.
    """

    def __init__(self, corpus: Corpus, kept: KeptPatches, lessons: Lessons, classes: Sequence[Sense]) -> None:
        self._corpus, self._kept, self._classes = corpus, kept, classes
        self._rows: dict[int, list[int]] = {}
        for row, (image, _) in enumerate(kept.views.tolist()):
            self._rows.setdefault(image, []).append(row)
        self._targets = lessons.target()

    def batch(self, step: int, batch_size: int, image_size: int, seed: int) -> dict[str, Any]:
        """The named streams of one step."""
        rng = np.random.default_rng([seed, step])
        photos = rng.choice(len(self._classes), round(PHOTOS * batch_size), replace=False)
        drawn, texts = self._corpus.draw_pairs(batch_size - len(photos), rng)
        names = [self._corpus.pairs[image]["name"] for image in drawn]
        for photo in photos:
            called = self._classes[photo].names
            names.append(called[rng.integers(len(called))])
            texts.append(templated(names[-1], rng))
        images = [*drawn, *(-1 - photos).tolist()]
        rows = [self._rows[image][rng.integers(len(self._rows[image]))] for image in images]
        patches = np.stack([self._kept.patches[row] for row in rows]).astype(np.float32)  # (B, W, h, w)
        pooled = unit(patches.mean((2, 3)))
        nowhere = np.zeros_like(pooled[0])
        return {
            "image": patches,
            "text": texts,
            "groups": np.array([crc32(name.encode()) for name in names]),
            "image_target": np.where((np.array(images) < 0)[:, None], pooled, 0),
            "text_target": np.stack([self._targets.get(name, nowhere) for name in names]),
        }


def together(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """The objective; a target of zeros holds nothing."""
    return {
        "contrast": contrast(out),
        "image": NEAR_IMAGE * _far(out["image"], out["image_target"]),
        "text": NEAR_TEXT * _far(out["text"], out["text_target"]),
    }


def _far(rows: Tensor, targets: Tensor) -> Tensor:
    """Mean of one less the cosine over rows that have a target."""
    held = targets.any(1)
    return torch.where(held, 1 - (rows * targets).sum(1), 0).sum() / held.sum().clamp(min=1)
