"""Small image files that the readers' tests share."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image


def _png(colour: tuple[int, int, int]) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def png():
    """colour -> an encoded 8 x 8 image of that colour."""
    return _png


@pytest.fixture
def pets(tmp_path) -> Path:
    """A folder of three classes with 2, 3 and 1 images, each of its own colour."""
    root = tmp_path / "pets"
    for row, (name, count) in enumerate({"cat": 2, "dog": 3, "great_owl": 1}.items()):
        (root / name).mkdir(parents=True)
        for column in range(count):
            (root / name / f"{column}.png").write_bytes(_png((row * 50, column * 50, 0)))
    return root
