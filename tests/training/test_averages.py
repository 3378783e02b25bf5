"""Averages along a run: each constructor against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch

from clipadapt.training.averages import Average, gaussian_weights


def path(steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(steps + 1, 3, generator=torch.Generator().manual_seed(seed))


def follow(average: Average, points: torch.Tensor, steps: range) -> None:
    """Walk the one followed parameter to points[step + 1] in each step."""
    for step in steps:
        with torch.no_grad():
            average.parameters[0].copy_(points[step + 1])
        average.update(step)


def test_ema_follows_the_formula():
    points = path(200)
    average = Average.ema([points[0].clone()], decay=0.9)
    expected = points[0].clone()
    for step in range(200):
        follow(average, points, range(step, step + 1))
        decay = min(0.9, (2 + step) / (11 + step))
        expected.lerp_(points[step + 1], 1 - decay)
        assert torch.equal(average.averages[0], expected)
    plain = points[0].double()
    for update in range(1, 201):
        decay = min(0.9, (1 + update) / (10 + update))
        plain = decay * plain + (1 - decay) * points[update].double()
    torch.testing.assert_close(expected.double(), plain, rtol=1e-5, atol=1e-6)


def test_ema_forgets_the_start_long_before_one_over_one_minus_decay():
    parameter = torch.tensor([100.0])
    average = Average.ema([parameter], decay=0.9999)
    parameter.fill_(1.0)
    for step in range(50):
        average.update(step)
    assert average.averages[0].item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("keep", [0.0, 0.9, 1.0])
def test_running_is_the_plain_running_mean(keep):
    points = path(20)
    average, expected = Average.running([points[0].clone()], keep), points[0].clone()
    follow(average, points, range(20))
    for point in points[1:]:
        expected.lerp_(point, 1 - keep)
    assert torch.equal(average.averages[0], expected)
    if keep != 0.9:
        assert torch.equal(expected, points[0 if keep else -1])


def test_a_constant_stays_what_it_is():
    parameter = torch.nn.Parameter(torch.tensor([[1.5, -2.0]]))
    averages = (Average.ema([parameter], 0.99), Average.beta([parameter], 0.5, 30), Average.running([parameter], 0.9))
    for average in averages:
        for step in range(30):
            average.update(step)
        assert torch.equal(average.averages[0], parameter.detach())
        assert not average.averages[0].requires_grad


def test_copies_into_other_tensors_leaving_the_parameters_alone():
    parameter = torch.tensor([3.0])
    average = Average.ema([parameter], decay=0.5)
    parameter.fill_(7.0)
    target = torch.zeros(())
    average.copy_to([target])
    assert target.item() == 3.0
    assert parameter.item() == 7.0
    with pytest.raises(ValueError, match="zip"):
        average.copy_to([])


@pytest.mark.parametrize("sharpness", [0.1, 0.5, 1.0, 3.0])
def test_beta_is_the_plain_weighted_mean(sharpness):
    steps, points = 20, path(20)
    average = Average.beta([torch.nn.Parameter(points[0].clone())], sharpness, steps)
    density = torch.distributions.Beta(torch.tensor(sharpness), torch.tensor(sharpness))
    weights = density.log_prob((torch.arange(steps + 1) + 0.5) / (steps + 1)).exp()
    for step in range(steps):
        follow(average, points, range(step, step + 1))
        seen = weights[: step + 2, None]
        torch.testing.assert_close(
            average.averages[0], (seen * points[: step + 2]).sum(0) / seen.sum(), atol=1e-5, rtol=0
        )
    assert not average.averages[0].requires_grad
    if sharpness == 1.0:
        torch.testing.assert_close(average.averages[0], points.mean(0))


def test_gaussian_is_the_weighted_sum_over_the_ends_of_epochs():
    points, epochs, per_epoch = path(12), 4, 3
    average = Average.gaussian([points[0].clone()], mean=3.0, std=1.5, epochs=epochs, per_epoch=per_epoch)
    weights = [math.exp(-((e - 3.0) ** 2) / (2 * 1.5**2)) for e in range(1, epochs + 1)]
    shares = gaussian_weights(epochs, 3.0, 1.5)
    torch.testing.assert_close(shares, torch.tensor(weights, dtype=torch.float64) / sum(weights))
    follow(average, points, range(12))
    total = torch.zeros(3)
    for epoch in range(epochs):
        total.add_(points[per_epoch * (epoch + 1)], alpha=shares[epoch].item())
    assert torch.equal(average.averages[0], total)
    assert gaussian_weights(3, 500, 0.1).tolist() == [0, 0, 1], "far from the mean, where densities are zero"


@pytest.mark.parametrize(
    "make",
    [
        lambda start: Average.beta([start], 0.5, 8),
        lambda start: Average.ema([start], 0.9),
        lambda start: Average.gaussian([start], 2.0, 1.0, 4, 2),
    ],
)
def test_an_average_goes_on_from_kept_tensors(make):
    """All that changes are the averages, so a run that restores them goes on."""
    points = path(8, seed=1)
    whole, first, second = (make(points[0].clone()) for _ in range(3))
    follow(whole, points, range(8))
    follow(first, points, range(5))
    second.averages[0].copy_(first.averages[0])
    follow(second, points, range(5, 8))
    assert torch.equal(second.averages[0], whole.averages[0])
