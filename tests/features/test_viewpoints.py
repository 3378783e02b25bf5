"""Turned views: the image itself without a turn, the geometry of a turned sheet, the same views in every run."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from clipadapt.features.viewpoints import turn, turned
from tests.images import colours


def dot(x: float, y: float, size: int = 201) -> Image.Image:
    """White, with a black dot of radius 4 at (x, y) from the middle."""
    rows, columns = np.mgrid[:size, :size] - size // 2
    inside = (columns - x) ** 2 + (rows - y) ** 2 <= 16
    return Image.fromarray(np.where(inside[..., None], 0, 255).astype(np.uint8).repeat(3, axis=2))


def middle_of_dot(image: Image.Image) -> tuple[float, float]:
    dark = 255.0 - np.asarray(image.convert("L"), dtype=float)
    rows, columns = np.mgrid[: image.height, : image.width] - image.height // 2
    return float((columns * dark).sum() / dark.sum()), float((rows * dark).sum() / dark.sum())


def test_no_turn_is_the_image():
    image = colours(1, seed=1).items[0].open()
    np.testing.assert_array_equal(np.asarray(turn(image, 0, 0, 0)), np.asarray(image))


@pytest.mark.parametrize(
    ("yaw", "pitch", "roll"), [(0.6, 0, 0), (-0.6, 0, 0), (0, 0.5, 0), (0, 0, 0.7), (0.4, -0.5, 0.3)]
)
def test_geometry(yaw, pitch, roll):
    """A point of the sheet is seen where a camera at twice the image's side from its middle sees it."""
    point = np.array([50.0, -30.0, 0.0])
    cos, sin = np.cos, np.sin
    rolled = np.array([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]]) @ point
    pitched = np.array([[1, 0, 0], [0, cos(pitch), -sin(pitch)], [0, sin(pitch), cos(pitch)]]) @ rolled
    x, y, z = np.array([[cos(yaw), 0, sin(yaw)], [0, 1, 0], [-sin(yaw), 0, cos(yaw)]]) @ pitched
    away = 2 * 201
    seen = middle_of_dot(turn(dot(50, -30), yaw, pitch, roll))
    assert seen == pytest.approx((x * away / (away + z), y * away / (away + z)), abs=0.7)


def test_what_is_bare_has_the_colour_of_the_corners():
    image = Image.new("RGB", (40, 40), (200, 100, 50))
    np.testing.assert_array_equal(
        np.unique(np.asarray(turn(image, 0.9, 0.3, 0.8)).reshape(-1, 3), axis=0), [[200, 100, 50]]
    )


def test_views_of_a_data_set():
    data = colours(2, seed=1)
    views = turned(data, 3, tilt=40, roll=20, seed=1)
    assert len(views) == 24
    assert views.labels == [label for label in data.labels for _ in range(3)]
    assert views.class_names == data.class_names
    assert len({item.digest() for item in views.items}) == 24
    assert len({item.open().tobytes() for item in views.items}) == 24
    random.seed(9)
    again, other = (turned(data, 3, tilt=40, roll=20, seed=seed) for seed in (1, 2))
    assert [item.open().tobytes() for item in again.items] == [item.open().tobytes() for item in views.items]
    assert [item.digest() for item in again.items] == [item.digest() for item in views.items]
    assert not {item.digest() for item in other.items} & {item.digest() for item in views.items}
    behind = turned(data, 2, tilt=40, roll=20, seed=1, plain=True)
    assert [item.digest() for item in behind.items[::3]] == [item.digest() for item in data.items]
    assert behind.items[1].open().tobytes() == views.items[1].open().tobytes()
    assert [item.name for item in behind.items[:3]] == [
        data.items[0].name,
        *(f"{data.items[0].name} view {i}" for i in (1, 2)),
    ]


def test_no_angle_leaves_every_view_as_it_was():
    data = colours(1, seed=1)
    for item, view in zip(data.items, turned(data, 1, tilt=0, roll=0, seed=1).items, strict=True):
        assert view.open().tobytes() == item.open().tobytes()
