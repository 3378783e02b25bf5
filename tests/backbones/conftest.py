"""One backbone of each family, made once; tests that change weights take a copy."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.backbones.families import FAMILIES
from tests.tiny import tiny

TEXTS = ["a photo of a cat.", "the small red house", "star", "a photo of the dog"]


@cache
def _loaded(family: str) -> Backbone:
    return load_backbone(tiny(family))


@pytest.fixture(params=sorted(FAMILIES))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """A tiny random backbone, once for every family."""
    return _loaded(request.param)


@pytest.fixture
def clip() -> Backbone:
    return _loaded("clip")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def texts() -> list[str]:
    return TEXTS


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden"
