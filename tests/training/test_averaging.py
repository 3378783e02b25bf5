import pytest
import torch

from clipadapt.training.averaging import EMA


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
