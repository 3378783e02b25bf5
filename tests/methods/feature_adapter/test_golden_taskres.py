"""TaskRes gives the figures of its official implementation; see the golden page's section of that name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from clipadapt.methods import create
from clipadapt.methods.feature_adapter.taskres import classifier
from clipadapt.training.loop import train
from tests.methods.test_golden_features import case, close

__all__ = ["case"]


def test_forward(case):
    c = case("taskres")
    rng = np.random.default_rng(100 + int(c.prefix[-2]))
    residual = torch.from_numpy((0.05 * rng.standard_normal(c.t.shape)).astype(np.float32))
    weight = 100 * classifier(c.t, residual, 0.5)
    close(c.x[c.probe] @ weight.T, c["forward_logits64"], 3e-6)
    assert c.accuracy(c.x[c.test] @ weight.T) == pytest.approx(float(c["forward_acc"]), abs=0.15)


def test_training(case):
    c = case("taskres")
    x, y = c.x[c.support], c.y[c.support]
    residual = torch.zeros_like(c.t).requires_grad_()
    losses = train(
        lambda rows: cross_entropy(100 * x[rows] @ classifier(c.t, residual, 0.5).T, y[rows]),
        torch.optim.Adam([residual], lr=2e-3, weight_decay=5e-4),
        [torch.arange(len(x))] * 20,
    )
    close(losses, c["losses"], 1e-5)
    residual = residual.detach()
    assert torch.linalg.norm(residual.double()).item() == pytest.approx(float(c["residual_fro"]), rel=1e-3)
    if "residual" in c:
        close(residual, c["residual"], 2e-2)  # Adam divides tiny gradients by their own size: single entries wander
    weight = 100 * classifier(c.t, residual, 0.5)
    close(c.x[c.probe] @ weight.T, c["trained_logits64"], 1e-4)
    assert c.accuracy(c.x[c.test] @ weight.T) == pytest.approx(float(c["trained_acc"]), abs=0.15)


@pytest.mark.parametrize(("shots", "epochs"), [(1, 100), (4, 100), (5, 200)])
def test_the_official_schedule(shots, epochs):
    """One epoch at 1e-5, then a cosine by epoch from the full rate; longer with more than four shots."""
    rng = np.random.default_rng(0)
    rates: list[float] = []
    create("taskres", batch_size=2).fit_features(
        rng.standard_normal((3 * shots, 8)),
        np.arange(3 * shots) % 3,
        rng.standard_normal((3, 8)),
        report=lambda step: rates.append(step["lr"]),
    )
    by_epoch = np.array(rates).reshape(epochs, -1)
    assert (by_epoch == by_epoch[:, :1]).all()
    expected = [1e-5, *(1e-3 * (1 + np.cos(np.pi * (e - 1) / epochs)) for e in range(1, epochs))]
    np.testing.assert_allclose(by_epoch[:, 0], expected, rtol=1e-9)
