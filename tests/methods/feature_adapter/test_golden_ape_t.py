"""APE-T gives the figures of its official implementation; see the golden page's section of that name."""

from __future__ import annotations

import pytest
import torch

from clipadapt.methods import create
from clipadapt.nn.cache import cache_logits
from clipadapt.training.cache_search import best_cache
from tests.methods.test_golden_features import Case, close
from tests.methods.training_free_few_shot.test_golden_ape import case as ape_case

__all__ = ["ape_case"]


@pytest.fixture
def case(ape_case, shared):
    c, share = ape_case
    return Case(shared, *c.prefix.strip("/").split("/"), "ape_t"), share


def fit(c: Case, share: float, **hyper):
    """In one batch, so that the order of the images cannot matter; also the loss of each step."""
    losses: list[float] = []
    head = create("ape-t", share=share, batch_size=1000, **hyper).fit_features(
        c.x[c.support], c.y[c.support], c.t, report=lambda step: losses.append(step["loss"])
    )
    return head, losses


@pytest.mark.parametrize("steps", [1, 10])
def test_training(case, steps):
    c, share = case
    head, losses = fit(c, share, epochs=steps)
    if steps == 1:
        assert set(head.channels_.tolist()) == set(c["steps1/indices"].tolist())
    close(losses, c[f"steps{steps}/losses"], 5e-6)
    residual = ((head.weight_ / 100 - c.t)[:, head.channels_]).detach()
    assert torch.linalg.norm(residual.double()).item() == pytest.approx(float(c[f"steps{steps}/res_fro"]), rel=1e-3)
    order = head.channels_.argsort()
    ours, golden = residual[:, order], torch.from_numpy(c[f"steps{steps}/res"])
    close(ours, golden[:, torch.from_numpy(c["steps1/indices"]).long().argsort()], 2e-3)
    close(head.values_.sum(1), c[f"steps{steps}/value_weights"], 2e-6)
    close(head.logits(c.x[c.probe]), c[f"steps{steps}/test_logits64"], 1e-5)
    assert c.accuracy(head.logits(c.x[c.test])) == pytest.approx(float(c[f"steps{steps}/test_acc"]), abs=0.15)
    assert head.trained_parameters == len(c.t) * 500 + len(c.support)


def test_before_the_first_step_it_is_the_plain_cache(case):
    c, share = case
    head, _ = fit(c, share, epochs=1, lr=0.0)
    close(head.logits(c.x[c.support[:16]]), c["steps1/train_logits_step0_first16"], 2e-6)


def test_val_chooses_the_epoch_and_then_beta_and_alpha(case):
    c, share = case
    x, y = c.x[c.val], c.y[c.val]

    def accuracy(head, beta: float, alpha: float) -> float:
        logits = x @ head.weight_.T + alpha * cache_logits(x, head.keys_, head.values_, beta)
        return (logits.argmax(1) == y).double().mean().item()

    last, best = (c.fit("ape-t", val=True, share=share, epochs=6, epoch=epoch) for epoch in ("last", "val"))
    assert accuracy(best, 1.0, 2.0) >= accuracy(last, 1.0, 2.0)
    for head in (last, best):
        searched = best_cache(x @ head.weight_.T, x @ head.keys_.T, head.values_, y, (7.0, 7.0))
        assert (head.beta_, head.alpha_) == searched
