"""What the tests of prompt methods that have no golden figures learn from."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.methods.kinds.prompts import Batch


@pytest.fixture
def batch(backbone) -> Batch:
    """Five random unit features of three classes, for the `backbone` of the test's own module."""
    generator = torch.Generator().manual_seed(3)
    images = normalize(torch.randn(5, backbone.dim, generator=generator), dim=1)
    return Batch(torch.arange(5), torch.tensor([0, 1, 2, 1, 0]), images, None)
