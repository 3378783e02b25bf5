"""Judging a whole grid of coefficients at once is the same as trying each."""

from __future__ import annotations

import torch

from clipadapt.training.search import best_on, hits_along


def test_hits_along_counts_each_setting():
    generator = torch.Generator().manual_seed(1)
    start, slope = torch.randn(3, 7, 4, generator=generator).double(), torch.randn(7, 4, generator=generator).double()
    slope[0] = 0  # this query's answer never changes
    slope[1, 2] = slope[1, 0]
    start[:, 2] = 0.0
    slope[2] = 1.0  # all equal: the first class wins
    labels, grid = torch.tensor([0, 2, 0, 1, 2, 3, 1]), torch.linspace(0.1, 3, 9).double()
    plain = [[int(((s + g * slope).argmax(1) == labels).sum()) for g in grid] for s in start]
    assert hits_along(start, slope, labels, grid).tolist() == plain


def test_the_first_of_equals_is_taken():
    labels = torch.tensor([0, 1])
    right, wrong = torch.eye(2), torch.eye(2).flip(0)
    assert best_on(labels, [("a", wrong), ("b", right), ("c", 2 * right)]) == ("b", 1.0)
