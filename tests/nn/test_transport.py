"""Sinkhorn's plan has equal marginals, is that of a long run in double precision, and cannot overflow."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.nn.transport import sinkhorn, transport_similarity


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_plan(cost: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Sinkhorn's own matrix scaling of cost matrices (..., P, N): 20,000 rounds in double precision."""
    kernel = (-cost.double() / epsilon).exp()
    p, n = cost.shape[-2:]
    columns = torch.ones(*cost.shape[:-2], n, 1, dtype=torch.float64)
    for _ in range(20_000):
        rows = (1 / p) / (kernel @ columns)
        columns = (1 / n) / (kernel.mT @ rows)
    return rows * kernel * columns.mT


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (1, 4), (4, 1)])
def test_the_plan_is_that_of_a_long_double_precision_run(shape, epsilon):
    p, n = shape
    cost = 1 - units(2, 3, p, 6) @ units(2, 3, n, 6, seed=1).transpose(-1, -2)  # (2, 3, P, N)
    plan = sinkhorn(cost, epsilon, iterations=10_000)
    assert plan.shape == cost.shape
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan.double(), slow_plan(cost, epsilon), rtol=1e-4, atol=5e-6)


def test_marginals_are_uniform():
    plan = sinkhorn(1 - units(50, 4, 8) @ units(50, 6, 8, seed=1).transpose(-1, -2), iterations=1000)
    torch.testing.assert_close(plan.sum(-1), torch.full((50, 4), 1 / 4), rtol=2e-5, atol=0)
    torch.testing.assert_close(plan.sum(-2), torch.full((50, 6), 1 / 6), rtol=1e-5, atol=0)


def test_a_vanishing_epsilon_gives_the_best_assignment():
    cost = torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
    best = min(sum(float(cost[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(4))) / 4
    plan = sinkhorn(cost, 1e-3, iterations=5000)
    assert torch.isfinite(plan).all()
    assert abs(float((plan * cost).sum()) - best) < 1e-3


def test_large_costs_do_not_overflow():
    """At exp((s - 1) / 0.1) with s = 40, as of features that are not unit, plain scaling is not finite."""
    cost = 1 - 40 * torch.rand(7, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.isfinite((-cost / 0.1).exp()).all()
    plan = sinkhorn(cost)
    assert torch.isfinite(plan).all()
    torch.testing.assert_close(plan.sum((-2, -1)), torch.ones(7), rtol=1e-3, atol=0)


def test_a_plan_does_not_depend_on_what_is_solved_beside_it():
    costs = 1 - units(20, 4, 8) @ units(20, 4, 8, seed=1).transpose(-1, -2)
    together = sinkhorn(costs)
    for one, plan in zip(costs, together, strict=True):
        torch.testing.assert_close(sinkhorn(one), plan, rtol=1e-4, atol=1e-6)
    assert sinkhorn(costs[:0]).shape == (0, 4, 4)


def test_similarity():
    left, right = units(5, 4, 8).requires_grad_(), units(5, 3, 8, seed=1)
    score = transport_similarity(left, right)
    plans = slow_plan(1 - left.detach() @ right.mT, 0.1)
    slow = [sum(float(plan[p, n] * (a[p] @ b[n])) for p in range(4) for n in range(3))
            for plan, a, b in zip(plans, left.detach(), right, strict=True)]  # fmt: skip
    torch.testing.assert_close(score.double(), torch.tensor(slow, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    score.sum().backward()  # the plan is a constant: the gradient of row p is the plan's mix of the other side
    wanted = plans.float() @ right
    torch.testing.assert_close(left.grad, wanted, rtol=1e-3, atol=1e-5)
    alone = transport_similarity(left[:, :1], right)  # one row meets all others alike
    torch.testing.assert_close(alone, (left[:, :1] @ right.transpose(-1, -2)).mean((-2, -1)))
    turned = transport_similarity(left.flip(1), right[:, [2, 0, 1]])
    torch.testing.assert_close(turned, score, rtol=1e-4, atol=1e-5)
