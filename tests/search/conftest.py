"""Drawn images of three colours, embedded by the embedded model, which knows colours well."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import Playground
from clipadapt.embeddings import encode_shard
from tests.features.conftest import CountingBackbone, write_images

COLOURS = ("red", "green", "blue")
PER_COLOUR = 5


@pytest.fixture(scope="session")
def embedded() -> Backbone:
    return load_backbone()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> list[str]:
    """Paths of plain stars, COLOURS in turn."""
    folder = tmp_path_factory.mktemp("drawn")
    playground, paths = Playground(kinds=("star",), styles=("flat",)), []
    for number in range(PER_COLOUR * len(COLOURS)):
        colour = COLOURS[number % len(COLOURS)]
        file = folder / colour / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        playground.scene(number, colour=colour, texture="plain").image.save(file)
        paths.append(str(file))
    return paths


@pytest.fixture(scope="session")
def emb(embedded, drawn, tmp_path_factory) -> Path:
    """Embeddings of `drawn` in two parts, with the column `year`: 2015, 2016, …"""
    folder = tmp_path_factory.mktemp("emb")
    for part in range(2):
        encode_shard(embedded, drawn, folder, (part, 2), columns={"year": list(range(2015, 2015 + len(drawn)))})
    return folder


@pytest.fixture
def counting() -> CountingBackbone:
    return CountingBackbone()


@pytest.fixture
def noise(counting, tmp_path) -> Path:
    """Embeddings of 30 images of noise by a backbone of a few numbers, in three parts."""
    paths = write_images(tmp_path / "noise", 30)
    for part in range(3):
        encode_shard(counting, paths, tmp_path / "emb", (part, 3), columns={"number": list(range(30))})
    return tmp_path / "emb"
