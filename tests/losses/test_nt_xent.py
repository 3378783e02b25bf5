"""NT-Xent equals its definition pair by pair."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

from clipadapt.losses.contrastive import nt_xent


def slow(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    views = [normalize(view.double(), dim=0) for view in [*first, *second]]
    size, total = len(first), 0.0
    for i, view in enumerate(views):
        others = [j for j in range(2 * size) if j != i]
        denominator = sum(math.exp(float(view @ views[j]) / temperature) for j in others)
        total -= float(view @ views[(i + size) % (2 * size)]) / temperature - math.log(denominator)
    return total / (2 * size)


def test_it_is_the_definition():
    first, second = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    for temperature in (0.1, 0.5):
        assert abs(float(nt_xent(first, second, temperature)) - slow(first, second, temperature)) < 1e-4
    torch.testing.assert_close(nt_xent(first, second), nt_xent(second, first))
    torch.testing.assert_close(nt_xent(3 * first, second), nt_xent(first, second))


def test_matched_pairs_are_best_and_one_pair_costs_nothing():
    eye = torch.eye(4)
    matched = float(nt_xent(eye, eye))
    assert abs(matched - math.log1p(6 * math.exp(-10))) < 1e-5
    assert float(nt_xent(eye, eye.roll(1, 0))) > matched + 1
    one = torch.randn(1, 3, requires_grad=True)
    loss = nt_xent(one, torch.randn(1, 3))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(one.grad).all()
