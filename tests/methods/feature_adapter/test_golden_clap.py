"""ZS-LP and CLAP give the figures of their official implementation, as far as those do not depend on rounding."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.methods import create
from clipadapt.methods.feature_adapter.clap import multipliers, objective, rate
from clipadapt.training.loop import train
from tests.methods.test_golden_features import ENCODERS, Case, case, close

__all__ = ["case"]


def first_steps(c, n: int, penalty: torch.Tensor | None) -> tuple[torch.Tensor, list[float]]:
    """Prototypes and losses of the first n of 300 full-batch steps."""
    x, y = c.x[c.support], c.y[c.support]
    prototypes = c.t.clone().requires_grad_()
    losses = train(
        lambda rows: objective(x[rows], y[rows], prototypes, c.t, 100.0, penalty),
        torch.optim.SGD([prototypes], lr=0.1, momentum=0.9),
        [torch.arange(len(y))] * n,
        schedule=lambda step: rate(step, 300, 0.1),
    )
    return prototypes.detach(), losses


def moved(prototypes: torch.Tensor, c) -> float:
    return torch.linalg.norm((prototypes - c.t).double()).item()


def test_zs_lp(case):
    c = case("clap")
    prototypes, losses = first_steps(c, 300, None)
    close(losses, c["zslp/losses"], 2e-5)
    assert moved(prototypes, c) == pytest.approx(float(c["zslp/weights_fro_diff_after300"]), rel=3e-4)
    logits = 100 * c.x @ normalize(prototypes, dim=1).T
    close(logits[c.probe], c["zslp/test_logits64"], 4e-4)
    assert c.accuracy(logits[c.test]) == pytest.approx(float(c["zslp/test_acc"]), abs=0.25)
    if "zslp/weights_after300" in c:
        close(prototypes, c["zslp/weights_after300"], 3e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_method_without_constraint_is_zs_lp(encoder, shared):
    """One batch of 76 images, shuffled; the published rate of every epoch."""
    c = Case(shared, encoder, "s4_seed1", "clap")
    head = create("clap", constraint="none").fit_features(c.x[c.support], c.y[c.support], c.t)
    close(head.logits(c.x[c.probe]), c["zslp/test_logits64"], 4e-4)
    assert [0.1 * rate(epoch, 300, 0.1) for epoch in range(300)] == pytest.approx(c["zslp/lrs"].tolist(), rel=1e-9)


def test_clap_until_rounding_decides(case):
    c = case("clap")
    lambdas = multipliers(100 * c.x[c.support] @ c.t.T, c.y[c.support])
    close(lambdas, c["clap/multipliers"], 1e-5)
    _, losses = first_steps(c, 40, lambdas)
    close(losses, c["clap/losses"][:40], 1e-2)
    close(losses[:10], c["clap/losses"][:10], 1e-4)
    assert moved(first_steps(c, 10, lambdas)[0], c) == pytest.approx(
        float(c["clap/weights_fro_diff_after10"]), rel=2e-4
    )
    after2 = first_steps(c, 2, lambdas)[0]
    assert moved(after2, c) == pytest.approx(float(c["clap/weights_fro_diff_after2"]), rel=2e-5)
    if "clap/weights_after2" in c:
        close(after2, c["clap/weights_after2"], 2e-5)


def test_a_class_without_images_gets_the_mean_multiplier():
    zero_shot = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    lambdas = multipliers(zero_shot, torch.tensor([0, 1]))
    own = zero_shot.softmax(1).diagonal()
    torch.testing.assert_close(lambdas, torch.tensor([own[0], own[1], own.mean()]))


@pytest.mark.claim("clap", "real CLIP features, 1, 4, 16 shots: the constraint against none (ZS-LP)")
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_constraint_helps(encoder, shared, claim):
    """At the published rate; the gain is largest with one image a class, where ZS-LP falls far below zero-shot."""
    held, free = [], []
    for shots, seed in product((1, 4, 16), (1, 2, 3)):
        c = Case(shared, encoder, f"s{shots}_seed{seed}", "clap")
        for found, constraint in ((held, "class"), (free, "none")):
            head = c.fit("clap", constraint=constraint)
            found.append(c.accuracy(head.logits(c.x[c.test])) / 100)
    claim({"clap": held, "ZS-LP": free})
    assert np.mean(held) > np.mean(free) + 0.03
    assert np.mean(held[:3]) > np.mean(free[:3]) + 0.1
