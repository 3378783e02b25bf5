"""Random crops that are the same in every run: augmented views of an image whose features can be kept."""

from __future__ import annotations

import math
import random
from hashlib import blake2b
from typing import NamedTuple

from PIL import Image

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width / height, of the Inception crop that the few-shot methods train on


class RandomView(NamedTuple):
    """A random resized crop, flipped in half of the cases.

    What is drawn depends on the image's content and these fields alone: neither on its place in a list nor on
    global state.
    """

    number: int  # which of the image's views
    seed: int
    min_scale: float  # the crop's share of the area is uniform in [min_scale, 1]

    def of(self, image: Image.Image, content: str, size: tuple[int, int]) -> Image.Image:
        """The view of `image`, whose digest is `content`, resized (bicubic) to `size`, (height, width)."""
        rng = random.Random(blake2b(f"{content} {self.number} {self.seed}".encode(), digest_size=16).digest())
        height, width = size
        view = image.resize((width, height), Image.Resampling.BICUBIC, box=self._crop(image, rng))
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view

    def _crop(self, image: Image.Image, rng: random.Random) -> tuple[int, int, int, int]:
        """(left, top, right, bottom); the whole image if ten draws do not fit into it."""
        low, high = map(math.log, ASPECT_RATIOS)
        for _ in range(10):
            area = image.width * image.height * rng.uniform(self.min_scale, 1.0)
            ratio = math.exp(rng.uniform(low, high))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= image.width and 0 < height <= image.height:
                left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
                return left, top, left + width, top + height
        return 0, 0, image.width, image.height
