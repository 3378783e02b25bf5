"""APE gives the figures of its official implementation, and its shortcuts those of the plain computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipadapt.methods import create
from clipadapt.methods.training_free_few_shot.ape import class_means, divergence, search
from clipadapt.nn.channels import criterion, similarity
from tests.methods.test_golden_features import ENCODERS, Case, close

OFFICIAL = {"clip_vit-b-32": 500 / 512, "clip_rn50": 500 / 1024}  # 500 channels, whatever the encoder


@pytest.fixture(params=[(e, f"s{shots}_seed1") for e in ENCODERS for shots in (1, 4)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request, shared):
    return Case(shared, *request.param, "ape"), OFFICIAL[request.param[0]]


def test_start_values(case):
    c, share = case
    s, one_hot = c.x[c.support], torch.nn.functional.one_hot(c.y[c.support], len(c.t)).float()
    means = class_means(c.t, s, one_hot)
    close(similarity(means), c["sim"], 5e-6)
    close(criterion(c.t, means, 0.7), c["criterion"], 5e-6)
    head = c.fit("ape", share=share, prototypes="texts+pictures")
    assert set(head.channels_.tolist()) == set(c["indices"].tolist())
    texts = torch.nn.functional.normalize(c.t[:, head.channels_], dim=1)
    close(divergence(head.keys_, texts, c.y[c.support]), c["cache_div"], 1e-6)
    close(head.logits(c.x[c.probe]), c["init_logits64"], 2e-6)
    assert c.accuracy(head.logits(c.x[c.test])) == pytest.approx(float(c["init_acc"]), abs=0.15)


def test_search_on_val(case):
    c, share = case
    head = c.fit("ape", val=True, share=share, prototypes="texts+pictures")
    assert (head.beta_, head.alpha_, head.gamma_) == pytest.approx(
        (float(c["beta"]), float(c["alpha"]), float(c["gamma"]))
    )
    close(head.logits(c.x[c.probe]), c["test_logits64"], 2e-6)
    assert c.accuracy(head.logits(c.x[c.test])) == pytest.approx(float(c["test_acc"]), abs=0.15)
    assert 100 * (head.logits(c.x[c.val]).argmax(1) == c.y[c.val]).double().mean() == pytest.approx(float(c["val_acc"]))


def test_similarity_is_the_mean_over_all_pairs():
    rng = np.random.default_rng(0)
    x, t, y = rng.standard_normal((12, 5)), rng.standard_normal((4, 5)), np.arange(12) % 4
    members = [np.vstack([t[c], x[y == c]]) for c in range(4)]
    pairs = [f * g for i in range(4) for j in range(4) if i != j for f in members[i] for g in members[j]]
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(y), 4).double()
    means = class_means(torch.from_numpy(t), torch.from_numpy(x), one_hot)
    np.testing.assert_allclose(similarity(means), np.mean(pairs, axis=0), atol=1e-12)


def test_search_is_the_plain_search():
    """Against all 20,000 settings written out: the same one, the first of equals."""
    rng = np.random.default_rng(1)
    affinity, zero_shot = (torch.from_numpy(rng.uniform(size=shape)) for shape in ((8, 6), (8, 3)))
    values = torch.nn.functional.one_hot(torch.arange(6) % 3, 3).double()
    surprise, labels = torch.from_numpy(rng.uniform(0, 9, 6)), torch.arange(8) % 3
    best, chosen = -1, (0.0, 0.0, 0.0)
    for beta in np.arange(200) * 6.9 / 200 + 0.1:
        for alpha in np.arange(20) * 6.9 / 20 + 0.1:
            for gamma in np.arange(5) / 10:
                cache = np.exp(-beta * (1 - affinity.numpy())) @ (values * torch.exp(gamma * surprise)[:, None]).numpy()
                right = ((zero_shot.numpy() + alpha * cache).argmax(1) == labels.numpy()).sum()
                if right > best:
                    best, chosen = right, (beta, alpha, gamma)
    assert search(zero_shot, affinity, values, surprise, labels) == pytest.approx(chosen)


def test_channels_from_texts_need_no_images():
    rng = np.random.default_rng(2)
    x, t = rng.standard_normal((6, 16)), rng.standard_normal((3, 16))
    one = create("ape").fit_features(x, [0, 0, 1, 1, 2, 2], t)
    other = create("ape").fit_features(-x, [0, 0, 1, 1, 2, 2], t)
    assert torch.equal(one.channels_, other.channels_)
    assert len(one.channels_) == round(16 * 500 / 1024)
    unit = t / np.linalg.norm(t, axis=1, keepdims=True)
    products = np.mean([unit[i] * unit[j] for i in range(3) for j in range(3) if i != j], axis=0)
    order = np.argsort(0.7 * products - 0.3 * unit.var(axis=0, ddof=1))
    np.testing.assert_array_equal(one.channels_, order[: len(one.channels_)])
