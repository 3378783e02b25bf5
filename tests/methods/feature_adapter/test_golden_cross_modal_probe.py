"""The cross-modal probe gives the figures of its official implementation (golden page, cross-modal linear probe)."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from clipadapt.methods import create
from clipadapt.methods.feature_adapter.cross_modal_probe import mixed_batches, rate, train_head, zero_shot_head
from clipadapt.training import loop
from tests.methods.test_golden_features import ENCODERS, Case, case, close

__all__ = ["case"]


@cache
def prompts(root: Path, encoder: str) -> torch.Tensor:
    """Unit features (106, 19, D) of 106 prompts for each class."""
    p = np.load(root / "data" / "whu-rs19" / f"{encoder}.npz")["prompt_features"].astype(np.float64)
    return torch.from_numpy((p / np.linalg.norm(p, axis=2, keepdims=True)).astype(np.float32))


class Run:
    """The published run: several prompts a class, as many as images; every step sees all rows."""

    def __init__(self, c, root: Path, val: bool) -> None:
        encoder, split, _ = c.prefix.split("/")
        shots, (classes, dim), self.scale = int(split[1:].split("_")[0]), c.t.shape, math.exp(4.60517)
        texts = prompts(root, encoder)[:shots].transpose(0, 1).reshape(-1, dim)  # (19 shots, D), class by class
        text_labels = torch.arange(classes).repeat_interleave(shots)
        self.start = zero_shot_head(texts, text_labels, classes)
        labels = torch.cat([c.y[c.support], text_labels])
        self.losses: list[float] = []
        self.head, self.step = train_head(
            torch.cat([c.x[c.support], texts]),
            labels,
            self.start,
            [torch.arange(len(labels))] * 301,
            logit_scale=self.scale,
            lr=1e-3,
            weight_decay=0.01,
            val=(c.x[c.val], c.y[c.val]) if val else None,
            run=loop.Run(lambda line: self.losses.append(line["loss"])),
        )


def test_best_iteration_on_val(case, shared):
    c = case("cross_modal_lp")
    run = Run(c, shared, val=True)
    close(run.losses, c["losses"], 1e-5)
    assert run.step == int(c["best_iter"])
    for weight, name in ((run.head, "head"), ((run.head + run.start) / 2, "wiseft")):
        close(run.scale * c.x[c.probe] @ weight.T, c[f"{name}_logits64"], 1e-4)
        assert c.accuracy(c.x[c.test] @ weight.T) == pytest.approx(float(c[f"{name}_acc"]), abs=0.15)


@pytest.mark.parametrize("split", ["s1_seed1", "s4_seed1"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_last_iteration(encoder, split, shared):
    c = Case(shared, encoder, split, "cross_modal_lp")
    run = Run(c, shared, val=False)
    assert run.step == 300
    close(run.start, c["zero_shot_head"], 1e-6)
    close(run.head, c["weights_after301"], 6e-4)
    moved = torch.linalg.norm((run.head - run.start).double()).item()
    assert moved == pytest.approx(float(c["weights_fro_diff_after301"]), rel=6e-4)
    assert [1e-3 * rate(step, 301, 1e-3) for step in range(301)] == pytest.approx(c["lrs"].tolist(), rel=1e-9)


@pytest.mark.parametrize(("images", "texts", "size"), [(10, 4, 6), (3, 19, 32), (1, 2, 2)])
def test_batches_hold_both_modalities(images, texts, size):
    steps = mixed_batches(images, texts, size, steps=50, seed=3)
    assert len(steps) == 50
    for rows in steps:
        assert 1 <= (rows < images).sum() <= min(size // 2, images)
        assert 1 <= (rows >= images).sum() <= min(size // 2, texts)
    seen = torch.bincount(torch.cat(steps), minlength=images + texts)
    assert seen[:images].max() - seen[:images].min() <= 1  # passes through every image before any comes again
    assert seen[images:].max() - seen[images:].min() <= 1
    assert all(
        torch.equal(a, b) for a, b in zip(steps, mixed_batches(images, texts, size, steps=50, seed=3), strict=True)
    )


def test_wise_ft_mixes_with_the_texts(shared):
    c = Case(shared, ENCODERS[0], "s4_seed1", "cross_modal_lp")
    support = c.x[c.support], c.y[c.support], c.t
    plain, half, texts = (create("cross-modal-probe", steps=20, wise_ft=r).fit_features(*support) for r in (0, 0.5, 1))
    close(texts.weight_, 100 * c.t, 1e-6)
    close(half.weight_, (plain.weight_ + texts.weight_) / 2, 1e-6)
