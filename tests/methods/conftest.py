"""What tests of methods learn from, unless their module says otherwise."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.backbones import load_backbone
from clipadapt.methods.kinds.prompts import Batch
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def support():
    return colours(3, seed=1)


@pytest.fixture
def batch(backbone) -> Batch:
    """Five random unit features of three classes, for the `backbone` of the test's own module."""
    generator = torch.Generator().manual_seed(3)
    images = normalize(torch.randn(5, backbone.dim, generator=generator), dim=1)
    return Batch(torch.arange(5), torch.tensor([0, 1, 2, 1, 0]), images, None)
