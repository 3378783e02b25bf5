"""Feature methods give the figures of the official implementations, on real CLIP features (README-features.md)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipadapt.methods import create
from clipadapt.methods.feature_adapter.clip_adapter import adapt
from clipadapt.methods.training_free_few_shot.gda_clip import GRID, discriminant
from clipadapt.nn.cache import cache_logits
from clipadapt.training.cache_search import best_cache
from clipadapt.training.loop import train
from clipadapt.training.schedules import cosine

ENCODERS = ("clip_vit-b-32", "clip_rn50")
SPLITS = [f"s{shots}_seed{seed}" for shots in (1, 4, 16) for seed in (1, 2, 3)]


@cache
def features(root: Path, encoder: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit image features (1005, D), labels, unit text features (19, D), as the golden page defines them."""
    z = np.load(root / "data" / "whu-rs19" / f"{encoder}.npz")

    def unit(a: np.ndarray) -> torch.Tensor:
        a = a.astype(np.float64)
        return torch.from_numpy((a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float32))

    return unit(z["image_features"]), torch.from_numpy(z["labels"]), unit(z["mean_prompt_features"])


class Case:
    """One encoder and split: support, validation, test and probe rows, and the stored arrays of a method."""

    def __init__(self, root: Path, encoder: str, split: str, method: str) -> None:
        self.x, self.y, self.t = features(root, encoder)
        rows = np.load(root / "golden" / "features" / "splits.npz")
        self.support, self.val, self.test, self.probe = (
            torch.from_numpy(rows[f"{split}/{part}"]).long() for part in ("support", "val", "test", "probe")
        )
        self.golden = np.load(root / "golden" / "features" / f"{method}.npz")
        self.prefix = f"{encoder}/{split}/"

    def __getitem__(self, name: str) -> np.ndarray:
        return self.golden[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.golden

    def fit(self, key: str, val: bool = False, **hyper):
        held_out = (self.x[self.val], self.y[self.val]) if val else None
        return create(key, **hyper).fit_features(self.x[self.support], self.y[self.support], self.t, val=held_out)

    def accuracy(self, logits: torch.Tensor) -> float:
        return 100 * (logits.argmax(1) == self.y[self.test]).double().mean().item()


@pytest.fixture(params=[(e, s) for e in ENCODERS for s in SPLITS], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request, shared):
    return lambda method: Case(shared, *request.param, method)


def close(ours, golden, relative: float) -> None:
    ours, golden = np.asarray(ours, dtype=np.float64), np.asarray(golden, dtype=np.float64)
    assert np.abs(ours - golden).max() <= relative * np.abs(golden).max()


def test_zero_shot(case):
    c = case("tip_adapter")
    head = c.fit("zero-shot")
    close(head.logits(c.x[c.probe]), c["clip_logits64"], 2e-6)
    assert c.accuracy(head.logits(c.x[c.test])) == pytest.approx(float(c["zeroshot_acc"]))


def test_tip_adapter(case):
    c = case("tip_adapter")
    for beta, alpha in ((1.0, 1.0), (5.5, 1.0), (1.0, 3.0)):
        head = c.fit("tip-adapter", beta=beta, alpha=alpha)
        close(head.logits(c.x[c.probe]), c[f"fixed_b{beta}_a{alpha}_logits64"], 2e-6)
        assert c.accuracy(head.logits(c.x[c.test])) == pytest.approx(float(c[f"fixed_b{beta}_a{alpha}_acc"]))


def test_tip_adapter_search(case):
    c = case("tip_adapter")
    head = c.fit("tip-adapter", val=True)
    assert (head.beta_, head.alpha_) == pytest.approx((float(c["beta"]), float(c["alpha"])))
    close(head.logits(c.x[c.probe]), c["test_logits64"], 3e-6)
    assert c.accuracy(head.logits(c.x[c.test])) == pytest.approx(float(c["test_acc"]))


def test_tip_adapter_f(case):
    c = case("tip_adapter_f")
    losses: list[float] = []
    # One batch holds the whole support set, so the order of the images cannot matter.
    head = create("tip-adapter-f", batch_size=1000).fit_features(
        c.x[c.support], c.y[c.support], c.t, report=lambda step: losses.append(step["loss"])
    )
    close(losses, c["losses"], 2e-5)
    assert torch.linalg.norm(head.keys_.double()).item() == pytest.approx(float(c["final_weight_fro"]), rel=1e-5)
    close(head.logits(c.x[c.probe]), c["test_logits64_final_init"], 1e-5)
    assert c.accuracy(head.logits(c.x[c.test])) == pytest.approx(float(c["test_acc_final_init"]), abs=0.15)
    if "final_weight" in c:
        close(head.keys_, c["final_weight"], 2e-5)


def test_tip_adapter_f_official_rule_selects_on_test(case):
    """The published script keeps the epoch that is best on test; given that epoch, everything after it is equal."""
    c = case("tip_adapter_f")
    head = create("tip-adapter-f", batch_size=1000, epoch="val").fit_features(
        c.x[c.support], c.y[c.support], c.t, val=(c.x[c.test], c.y[c.test])
    )
    logits = 100 * c.x[c.test] @ c.t.T + 1.17 * cache_logits(c.x[c.test], head.keys_, head.values_, 1.0)
    assert c.accuracy(logits) == pytest.approx(float(c["best_test_acc_during_training"]), abs=0.15)
    if "best_weight" in c:
        close(head.keys_, c["best_weight"], 2e-5)
        val = c.x[c.val]
        beta, alpha = best_cache(100 * val @ c.t.T, val @ head.keys_.T, head.values_, c.y[c.val])
        assert (beta, alpha) == pytest.approx((float(c["beta"]), float(c["alpha"])))


def test_gda_clip(case):
    c = case("gda")
    head = c.fit("gda-clip", val=True)
    assert head.alpha_ == pytest.approx(float(c["alpha"]))
    assert pytest.approx(c["alpha_grid"]) == GRID
    close(head.logits(c.x[c.probe]), c["test_logits64"], 2e-5)
    assert c.accuracy(head.logits(c.x[c.test])) == pytest.approx(float(c["test_acc"]), abs=0.15)
    weight, bias = discriminant(c.x[c.support], c.y[c.support], len(c.t))
    close(torch.linalg.norm(weight, dim=1), c["W_col_norm"], 1e-5)
    close(bias, c["b"], 1e-5)
    if "W" in c:
        close(weight.T, c["W"], 1e-5)


def test_clip_adapter(case):
    c = case("clip_adapter")
    dim, seed = c.x.shape[1], int(c.prefix[-2])
    rng = np.random.default_rng(200 + seed)
    w1 = torch.from_numpy((rng.standard_normal((dim // 4, dim)) / np.sqrt(dim)).astype(np.float32))
    w2 = torch.from_numpy((rng.standard_normal((dim, dim // 4)) / np.sqrt(dim // 4)).astype(np.float32))
    np.testing.assert_array_equal(w1[0], c["W1_init_row0"])

    def logits(x: torch.Tensor) -> torch.Tensor:
        return 100 * normalize(adapt(x, w1, w2, 0.2), dim=1) @ c.t.T

    close(logits(c.x[c.probe]), c["forward_logits64"], 3e-6)
    s, y = c.x[c.support], c.y[c.support]
    w1.requires_grad_(), w2.requires_grad_()
    optimizer = torch.optim.SGD([w1, w2], lr=0.002, momentum=0.9, weight_decay=5e-4)
    losses = train(lambda rows: cross_entropy(logits(s[rows]), y[rows]), optimizer, [torch.arange(len(s))] * 10)
    close(losses, c["losses"], 1e-5)
    with torch.no_grad():
        close(logits(c.x[c.probe]), c["trained_logits64"], 3e-6)
    close(w1[0].detach(), c["W1_row0"], 3e-6)
    close(w2[0].detach(), c["W2_row0"], 3e-6)


def test_cosine_is_the_official_schedule():
    """AdamW's rate in the Tip-Adapter-F figures: lr (1 + cos(pi t / 20)) / 2."""
    ours = [cosine(step, 20) for step in range(20)]
    assert ours == pytest.approx([(1 + np.cos(np.pi * t / 20)) / 2 for t in range(20)])
