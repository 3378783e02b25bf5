import pytest
import torch

from clipadapt.training.averaging import EMA, BetaAverage


def test_follows_the_formula():
    parameter = torch.tensor([1.0])
    ema = EMA([parameter], decay=0.9)
    expected = 1.0
    for update in range(1, 200):
        parameter.fill_(float(update))
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
    assert ema.averages[0].item() == pytest.approx(expected, rel=1e-5)


def test_forgets_the_start_long_before_one_over_one_minus_decay():
    parameter = torch.tensor([100.0])
    ema = EMA([parameter], decay=0.9999)
    parameter.fill_(1.0)
    for _ in range(50):
        ema.update()
    assert ema.averages[0].item() == pytest.approx(1.0, abs=0.01)


def test_a_constant_stays_what_it_is():
    parameter = torch.nn.Parameter(torch.tensor([[1.5, -2.0]]))
    ema = EMA([parameter], decay=0.99)
    for _ in range(30):
        ema.update()
    assert torch.equal(ema.averages[0], parameter.detach())
    assert not ema.averages[0].requires_grad


def test_copies_into_other_tensors_leaving_the_parameters_alone():
    parameter = torch.tensor([3.0])
    ema = EMA([parameter], decay=0.5)
    parameter.fill_(7.0)
    target = torch.zeros(())
    ema.copy_to([target])
    assert target.item() == 3.0
    assert parameter.item() == 7.0
    with pytest.raises(ValueError, match="zip"):
        ema.copy_to([])


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 3.0])
def test_beta_average_is_the_plain_weighted_mean(beta):
    generator, steps = torch.Generator().manual_seed(0), 20
    path = torch.randn(steps + 1, 3, generator=generator)
    parameter = torch.nn.Parameter(path[0].clone())
    average = BetaAverage([parameter], beta, steps)
    density = torch.distributions.Beta(torch.tensor(beta), torch.tensor(beta))
    weights = density.log_prob((torch.arange(steps + 1) + 0.5) / (steps + 1)).exp()
    for step in range(1, steps + 1):
        with torch.no_grad():
            parameter.copy_(path[step])
        average.update(step)
        seen = weights[: step + 1, None]
        torch.testing.assert_close(
            average.averages[0], (seen * path[: step + 1]).sum(0) / seen.sum(), atol=1e-5, rtol=0
        )
    assert not average.averages[0].requires_grad
    if beta == 1.0:
        torch.testing.assert_close(average.averages[0], path.mean(0))


def test_beta_average_goes_on_from_kept_tensors():
    """All that changes are the averages, so a run that restores them goes on."""
    path = torch.randn(9, 2, generator=torch.Generator().manual_seed(1))

    def follow(average: BetaAverage, steps: range) -> None:
        for step in steps:
            average.parameters[0].copy_(path[step])
            average.update(step)

    whole = BetaAverage([path[0].clone()], 0.5, 8)
    follow(whole, range(1, 9))
    first, second = BetaAverage([path[0].clone()], 0.5, 8), BetaAverage([path[0].clone()], 0.5, 8)
    follow(first, range(1, 5))
    second.averages[0].copy_(first.averages[0])
    follow(second, range(5, 9))
    assert torch.equal(second.averages[0], whole.averages[0])
    kept = BetaAverage([torch.ones(2)], 0.5, 8)
    assert torch.equal(kept.averages[0], torch.ones(2))
