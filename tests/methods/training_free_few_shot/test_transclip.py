"""TransCLIP gives the official figures and the published accuracies; its shortcuts equal plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

from clipadapt.methods import create
from clipadapt.methods.training_free_few_shot.transclip import (
    GAMMAS,
    affinities,
    first_means,
    gaussians,
    log_density,
    nearest,
    transduce,
)
from tests.methods.test_golden_features import ENCODERS, SPLITS, Case, close, features


def percent(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (scores.argmax(1) == labels).double().mean().item()


@pytest.fixture(params=ENCODERS)
def zero_shot(request, shared):
    x, y, t = features(shared, request.param)
    golden = np.load(shared / "golden" / "features" / "transclip.npz")
    model = create("transclip").fit_features(x[:0], [], t, unlabelled=x)
    return x, y, t, model, lambda name: golden[f"{request.param}/zeroshot_all/{name}"]


@pytest.fixture
def task():
    """16 images, 5 labelled ones of the classes 0, 0, 1, 2, 2, assignments to 4 classes."""
    g = torch.Generator().manual_seed(0)
    x, support = (normalize(torch.randn(n, 6, generator=g, dtype=torch.float64), dim=1) for n in (16, 5))
    z = torch.randn(16, 4, generator=g, dtype=torch.float64).softmax(1)
    return x, z, support, one_hot(torch.tensor([0, 0, 1, 2, 2]), 4).double()


def test_zero_shot_figures(zero_shot):
    x, y, t, model, golden = zero_shot
    close(model.assignments_, golden("z"), 6e-5)
    assert percent(model.assignments_, y) == pytest.approx(float(golden("published_acc")))
    assert percent(100 * x @ t.T, y) == pytest.approx(float(golden("published_zeroshot_acc")))
    neighbours = nearest(x, x, 3, leave_out="self").coalesce().indices()[1].reshape(-1, 3)
    np.testing.assert_array_equal(neighbours.sort(1).values, golden("neighbours"))
    prior = (100 * x @ t.T).log_softmax(1)
    among, _ = affinities(x, x[:0], 3)
    none = torch.empty(0, len(t))
    start = prior.exp(), first_means(x, prior.exp(), x[:0], none), torch.full((x.shape[1],), 1 / x.shape[1])
    z, means, variance = transduce(x, prior, 50 / 6 * among, torch.zeros_like(prior), x[:0], none, 0.0, start)
    torch.testing.assert_close(z, model.assignments_)
    close(means, golden("mu"), 4e-6)
    close(variance, golden("std"), 1e-4)


def test_inductive_is_nearly_transductive(zero_shot):
    """Without its neighbours' pull an image mostly gets the same class, and both are far above zero-shot."""
    x, y, _, model, golden = zero_shot
    inductive = model.logits(x)
    assert (inductive.argmax(1) == model.assignments_.argmax(1)).double().mean() > 0.99
    assert abs(percent(inductive, y) - percent(model.assignments_, y)) < 0.5
    assert percent(inductive, y) > float(golden("published_zeroshot_acc")) + 8


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("split", SPLITS)
def test_few_shot_figures_of_the_official_code(shared, encoder, split):
    c = Case(shared, encoder, split, "transclip")
    model = create("transclip", variant="official-code").fit_features(
        c.x[c.support], c.y[c.support], c.t, unlabelled=c.x[c.test], val=(c.x[c.val], c.y[c.val])
    )
    probe = torch.searchsorted(c.test, c.probe)
    close(model.assignments_[probe], c["z64_last_gamma"], 2e-4)
    assert c.accuracy(model.assignments_) == pytest.approx(float(c["acc_last_gamma"]), abs=0.12)
    assert model.gamma_ == GAMMAS[int(np.argmax(c["own_val_per_gamma"]))]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("shots", [4, 16])
def test_labelled_images_help(shared, encoder, shots):
    """Mean of three support sets: above transduction without them, and about what the official code reaches."""
    right, official, unlabelled = [], [], []
    for seed in (1, 2, 3):
        c = Case(shared, encoder, f"s{shots}_seed{seed}", "transclip")
        x, t, val = c.x[c.test], c.t, (c.x[c.val], c.y[c.val])
        model = create("transclip").fit_features(c.x[c.support], c.y[c.support], t, unlabelled=x, val=val)
        right.append(c.accuracy(model.assignments_))
        official.append(float(c["acc_best_val_gamma"]))
        unlabelled.append(c.accuracy(create("transclip").fit_features(x[:0], [], t, unlabelled=x).assignments_))
    assert np.mean(right) > np.mean(official) - 0.3
    if encoder == "clip_vit-b-32":
        assert np.mean(right) > np.mean(unlabelled) + 3


def test_density_is_the_plain_one(task):
    x, z, *_ = task
    variance = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    means = normalize(z.T @ x, dim=1)
    plain = (-0.5 * (x[:, None] - means[None]) ** 2 / variance).sum(-1)  # from an (N, C, D) tensor
    close(log_density(x, means, variance), plain, 1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.02])
def test_gaussians_are_the_plain_ones(task, gamma):
    x, z, support, y = task
    weights = torch.cat([z / len(x), 50 * gamma / len(support) * y])
    rows = torch.cat([x, support])
    means, variance = gaussians(x, z, support, y, gamma)
    close(means, normalize(weights.T @ rows / weights.sum(0)[:, None], dim=1), 1e-12)
    plain = torch.einsum("nc,ncd->d", weights, (rows[:, None] - means[None]) ** 2) / weights.sum()
    close(variance, plain, 1e-12)


def test_neighbours_in_blocks(task):
    x, _, support, _ = task
    full = (x @ x.T).fill_diagonal_(-1)
    plain = torch.zeros_like(full).scatter(1, full.topk(3).indices, full.topk(3).values)
    close(nearest(x, x, 3, leave_out="self", block=5).to_dense(), plain, 1e-12)
    among, across = affinities(x, support, 3)
    close(among.to_dense(), plain + plain.T, 1e-12)
    both = support @ x.T
    close(across.to_dense(), torch.zeros_like(both).scatter(1, both.topk(3).indices, both.topk(3).values).T, 1e-12)
    twins = torch.cat([x[:1], x[:1], x[:1], x[1:3]])  # equal images are each other's neighbours, never their own
    assert (nearest(twins, twins, 2, leave_out="self").to_dense().diagonal() == 0).all()


def test_gammas_start_afresh(shared):
    """The grid's order cannot matter: the model that `val` chooses is the one fitted with that gamma alone."""
    c = Case(shared, ENCODERS[0], "s4_seed2", "transclip")
    args = c.x[c.support], c.y[c.support], c.t
    searched = create("transclip").fit_features(*args, unlabelled=c.x[c.test], val=(c.x[c.val], c.y[c.val]))
    alone = create("transclip", gamma=searched.gamma_).fit_features(*args, unlabelled=c.x[c.test])
    assert searched.gamma_ != GAMMAS[0]
    torch.testing.assert_close(alone.assignments_, searched.assignments_)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_very_few_images(images):
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(images, 8, generator=g), torch.randn(3, 8, generator=g)
    model = create("transclip").fit_features(x[:0], [], t, unlabelled=x, logit_scale=10.0)
    assert model.assignments_.shape == (images, 3)
    assert torch.isfinite(model.assignments_).all()
    assert torch.isfinite(model.logits(x)).all()
