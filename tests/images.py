"""Small labelled images that tests make."""

from __future__ import annotations

import numpy as np
from PIL import Image

from clipadapt.data import Dataset, image_list

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200), "yellow": (230, 220, 40)}


def colours(per_class: int, seed: int, noise: int = 25) -> Dataset:
    """Noisy plain 32 x 32 images of four colours: easy to learn, and no two alike."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for label, colour in enumerate(COLOURS.values()):
        for _ in range(per_class):
            pixels = np.array(colour) + rng.integers(-noise, noise, (32, 32, 3)) + rng.integers(-noise, noise, 3)
            images.append(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
            labels.append(label)
    return image_list(images, labels, list(COLOURS))
