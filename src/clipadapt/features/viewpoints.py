"""Images seen from other viewpoints: each is a flat sheet turned before the camera, the same in every run."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b

import numpy as np
from PIL import Image

from clipadapt.data import Dataset, Item
from clipadapt.data.items import hash_bytes

DISTANCE = 2.0  # of the camera, in the sheet's longer side


@dataclass(frozen=True)
class TurnedItem(Item):
    """An image turned about its middle; how far depends on its content, the `number` of the view and the `seed`.

    tilt  greatest angle, in degrees below 90, about the vertical and about the horizontal axis
    roll  greatest angle, in degrees, in the image's plane
    """

    item: Item
    number: int
    seed: int
    tilt: float
    roll: float

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.item.name} view {self.number}"

    def open(self) -> Image.Image:
        image = self.item.open()
        rng = random.Random(blake2b(self._key.encode(), digest_size=16).digest())
        angles = [math.radians(rng.uniform(-most, most)) for most in (self.tilt, self.tilt, self.roll)]
        return turn(image, *angles)

    def digest(self) -> str:
        return hash_bytes(f"turned {self._key} {self.tilt} {self.roll}".encode())

    @cached_property
    def _key(self) -> str:
        return f"{self.item.digest()} {self.number} {self.seed}"


def turn(image: Image.Image, yaw: float, pitch: float, roll: float) -> Image.Image:
    """`image` (RGB) on a sheet that is turned by these angles (radians); what it leaves bare is its corners' mean."""
    width, height = image.size
    away = DISTANCE * max(width, height)
    (a, b), (c, d) = np.array([[math.cos(roll), -math.sin(roll)], [math.sin(roll), math.cos(roll)]])
    about_x = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    about_y = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    turned = about_y @ about_x @ np.array([[a, b, 0], [c, d, 0], [0, 0, 1]])
    seen = np.diag([away, away, 1.0]) @ turned  # of a point (x, y, 0): away * X, away * Y, Z
    seen[:, 2] = 0, 0, away  # the sheet's points have no depth; its middle is `away`
    middle = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    back = middle @ np.linalg.inv(seen) @ np.linalg.inv(middle)
    corners = np.asarray(image, dtype=np.float64)[[0, 0, -1, -1], [0, -1, 0, -1]]  # (4, 3)
    return image.transform(
        image.size,
        Image.Transform.PERSPECTIVE,
        tuple((back / back[2, 2]).ravel()[:8]),
        Image.Resampling.BICUBIC,
        fillcolor=tuple(corners.mean(0).round().astype(int).tolist()),
    )


def turned(data: Dataset, views: int, *, tilt: float, roll: float, seed: int, plain: bool = False) -> Dataset:
    """`views` turned views of each image of `data`, with `plain` behind the image itself; labels are its own."""
    each = views + plain
    rows = data.select([row for row in range(len(data)) for _ in range(each)])
    items: list[Item] = [
        item if plain and i % each == 0 else TurnedItem(item, i % each, seed, tilt, roll)
        for i, item in enumerate(rows.items)
    ]
    return replace(rows, items=items)
