"""The ranking loss against plain loops, and what it must be where the answer is known."""

from __future__ import annotations

import pytest
import torch

from clipadapt.losses.ranking import pairwise_ranking


@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_equals_plain_loops_with_gradients(margin):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.rand(7, 5, generator=generator) < 0.4
    targets[0], targets[1] = False, True
    total = torch.zeros((), dtype=torch.float64)
    for row, shown in zip(scores, targets, strict=True):
        for i in range(5):
            for j in range(5):
                if shown[i] and not shown[j]:
                    total = total + max(margin - row[i] + row[j], torch.zeros((), dtype=torch.float64))
    expected = total / 7
    loss = pairwise_ranking(scores, targets, margin)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores))


def test_is_zero_where_every_gap_exceeds_the_margin():
    targets = torch.tensor([[True, False, True], [False, False, True]])
    assert pairwise_ranking(1.01 * targets.float(), targets) == 0
    assert pairwise_ranking(torch.zeros(2, 3), targets) == (2 + 2) / 2  # each pair of equals costs the margin
    none = torch.zeros(2, 3, requires_grad=True)
    pairwise_ranking(none, torch.zeros(2, 3, dtype=torch.bool)).backward()
    assert (none.grad == 0).all()
