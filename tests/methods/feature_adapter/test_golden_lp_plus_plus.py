"""LP++ gives the figures of its official implementation; see the golden page's section of that name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipadapt.methods import create
from clipadapt.methods.feature_adapter.lp_plus_plus import initial_alpha, step_sizes
from tests.methods.test_golden_features import case, close

__all__ = ["case"]


def test_step_sizes_and_start(case):
    c = case("lp_plus_plus")
    x, y = c.x[c.support], c.y[c.support]
    lr_w, lr_alpha = step_sizes(x, c.t)
    assert lr_w == pytest.approx(float(c["lr_w"]), rel=3e-6)
    assert lr_alpha == pytest.approx(float(c["lr_alpha"]), rel=2e-6)
    assert initial_alpha(x, y, c.t, 250.0) == pytest.approx(float(c["alpha_init"]), rel=1e-6)


def test_official_variant(case):
    c = case("lp_plus_plus")
    seed = int(c.prefix[-2])

    def fit(steps: int, val: bool = False):
        losses.clear()
        support, held_out = (c.x[c.support], c.y[c.support]), (c.x[c.val], c.y[c.val])
        return create("lp++", variant="official", seed=seed, steps=steps).fit_features(
            *support, c.t, val=held_out if val else None, report=lambda step: losses.append(step["loss"])
        )

    losses: list[float] = []
    for steps in (1, 10, 300):
        head = fit(steps)
        close(head.alpha_, c[f"alpha_after{steps}"], 3e-6)
        close(head.bias_, c[f"bias_after{steps}"], 3e-5)
        w = head.weight_ - head.alpha_[:, None] * c.t
        assert torch.linalg.norm(w.double()).item() == pytest.approx(float(c[f"W_fro_after{steps}"]), rel=1e-5)
        if f"W_after{steps}" in c:
            close(head.weight_, c[f"W_after{steps}"] + c[f"alpha_after{steps}"][:, None] * c.t.numpy(), 3e-6)
    close(losses, c["losses"], 1e-5)
    best = fit(300, val=True)  # the last of the best iterations
    close(best.logits(c.x[c.probe]), c["test_logits64_best"], 5e-6)
    assert c.accuracy(best.logits(c.x[c.test])) == pytest.approx(float(c["test_acc"]), abs=0.15)


def test_paper_variant_takes_the_present_gradient():
    """Against plain gradient steps written out in float64: no bias, and alpha's gradient is cleared."""
    rng = np.random.default_rng(0)
    x = normalize(torch.from_numpy(rng.standard_normal((12, 6))), dim=1)
    t = normalize(torch.from_numpy(rng.standard_normal((3, 6))), dim=1)
    y = torch.arange(12) % 3
    lr_w, lr_alpha = step_sizes(x, t)
    w = torch.stack([x[y == c].sum(0) for c in range(3)])
    alpha = torch.full((3,), 5.0 * sum((x[y == c] @ t[c]).mean().item() for c in range(3)) / 3, dtype=torch.float64)
    velocity = torch.zeros_like(w)
    for step in range(1, 31):
        w.requires_grad_(), alpha.requires_grad_()
        grad_w, grad_alpha = torch.autograd.grad(cross_entropy(x @ w.T + alpha * (x @ t.T), y), (w, alpha))
        velocity = 0.9 * velocity + grad_w
        w = w.detach() - lr_w * velocity
        alpha = alpha.detach() - lr_alpha * grad_alpha * (step % 10 == 0)
    head = create("lp++", steps=30, alpha_scale=5.0).fit_features(x, y, t)
    close(head.alpha_, alpha, 1e-5)
    close(head.weight_, w + alpha[:, None] * t, 1e-5)
    assert not head.bias_.any()
    assert head.trained_parameters == 3 * 6 + 3
