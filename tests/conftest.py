"""Fixtures that several test folders need."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

if os.environ.get("PYTEST_XDIST_WORKER"):  # a process for each core: more threads would only be in each other's way
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)  # which such a process gets, and which would fix the width of all output


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden figures beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is missing; tests on real data need it")
        pytest.skip(f"{folder} is missing: no real data to test on")
    return folder


@pytest.fixture
def claim(request, record_property):
    """Takes the figures of a test marked `claim`, one for each seed, by what they are of; see benchmarks/claims.py.

    The method's own come first, then those of what it is to be better than.
    """
    method, says = request.node.get_closest_marker("claim").args

    def keep(figures: dict[str, list[float]]) -> None:
        values = {name: [float(v) for v in np.atleast_1d(of)] for name, of in figures.items()}
        record_property("claim", {"method": method, "claim": says, "figures": values})

    return keep


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Feature caches of tests never touch the user's own."""
    monkeypatch.setenv("CLIPADAPT_CACHE", str(tmp_path_factory.mktemp("cache")))
