"""Pixels of labelled images, batch by batch, for methods whose image tower is trained."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.features.views import RandomView


class Pixels:
    """Preprocessed images (B, 3, H, W) of the rows asked for, plain or in a fresh random crop each time.

    `min_scale` is the least share of the area that a random resized crop keeps (then flipped in half of the cases);
    1.0 means no augmentation. What is drawn depends on the image, the `seed` and `number`, and on nothing else.
    """

    def __init__(self, backbone: Backbone, data: Dataset, *, min_scale: float, seed: int) -> None:
        self._backbone, self._items = backbone, data.items
        self._min_scale, self._seed = min_scale, seed
        self._digests: dict[int, str] = {}
        self._threads = ThreadPoolExecutor()  # Pillow decodes and resizes without the interpreter's lock

    def batch(self, rows: Tensor | Sequence[int], number: int) -> Tensor:
        """The images of `rows` in their view `number` (the epoch or step): (B, 3, H, W)."""

        def one(row: int) -> Tensor:
            item = self._items[row]
            image = item.open()
            if self._min_scale < 1:
                if row not in self._digests:
                    self._digests[row] = item.digest()
                view = RandomView(number, self._seed, self._min_scale)
                image = view.of(image, self._digests[row], self._backbone.image_size)
            return self._backbone.preprocess(image)

        return torch.stack(list(self._threads.map(one, [int(row) for row in rows]))).to(self._backbone.device)
