"""GDA beyond few shots: new classes as the official code synthesises them, unlabelled images, long tails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

from clipadapt.backbones import load_backbone
from clipadapt.backbones.published import PublishedFeatures
from clipadapt.data import Dataset
from clipadapt.data.items import FeatureItem
from clipadapt.data.playground.drawing import Playground
from clipadapt.methods import create
from clipadapt.methods.training_free_few_shot.gda_clip import gaussians, mixture, new_classes, new_means
from tests.methods.test_golden_features import ENCODERS, Case, close, features


def percent(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (scores.argmax(1) == labels).double().mean().item()


@pytest.fixture(scope="module")
def playground():
    """The embedded model, and drawn images of every kind, 8 to learn from and 8 to be judged on."""
    train, test = Playground(seed=1).dataset(16).split(test=0.5, seed=1)
    return load_backbone(), train, test


# -- new classes ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2, 3])
def base_to_new(request, shared):
    """Features, labels and texts of the encoder that the figures exist for, and the arrays of one seed."""
    golden = np.load(shared / "golden" / "features" / "gda_base_to_new.npz")
    key = f"clip_vit-b-32/s16_seed{request.param}/"
    return *features(shared, "clip_vit-b-32"), lambda name: golden[key + name]


def test_base_classes_as_in_the_official_code(base_to_new):
    x, y, t, golden = base_to_new
    support, val, test, probe = (torch.from_numpy(golden(f"base_{n}")) for n in ("support", "val", "test", "probe"))
    head = create("gda-clip", covariance="balanced-pinv").fit_features(
        x[support], y[support], t[:10], val=(x[val], y[val])
    )
    assert head.alpha_ == pytest.approx(float(golden("alpha")))
    close(head.gda_weight_.T, golden("W_base"), 1e-4)
    close(head.gda_bias_, golden("b_base"), 1e-4)
    close(head.logits(x[probe]), golden("base_logits64"), 1e-4)
    assert percent(head.logits(x[test]), y[test]) == pytest.approx(float(golden("base_acc")), abs=0.31)


def test_new_classes_as_in_the_official_code(base_to_new):
    x, y, t, golden = base_to_new
    support, test, probe = (torch.from_numpy(golden(n)) for n in ("base_support", "new_test", "new_probe"))
    means, nearest = new_means(t[10:], x[support])
    close(means, golden("mu_new"), 1e-6)
    np.testing.assert_array_equal(support[nearest].sort(1).values, np.sort(golden("neighbours_new"), axis=1))
    weight, bias = new_classes(t[10:], x[support])
    close(weight.T, golden("W_new"), 3e-5)
    close(bias, golden("b_new"), 1e-5)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return 100 * x[rows] @ t[10:].T + float(golden("alpha")) * (x[rows] @ weight.T + bias)

    close(logits(probe), golden("new_logits64"), 1e-5)
    assert percent(logits(test), y[test] - 10) == pytest.approx(float(golden("new_acc")), abs=0.35)


def test_a_fitted_model_takes_new_classes_by_name(base_to_new):
    x, y, t, golden = base_to_new
    names = [f"class {c}" for c in range(19)]
    backbone = PublishedFeatures("whu-rs19", dict(zip(names, t, strict=True)))

    rows = golden("base_support")
    support = Dataset([FeatureItem(f"row {r}", x[r]) for r in rows], y[rows].tolist(), names[:10])
    new = create("gda-clip", alpha=float(golden("alpha"))).fit(backbone, support).with_classes(names[10:])
    probe = [FeatureItem(f"row {r}", x[r]) for r in golden("new_probe")]
    shift = new.image_logits(probe)[0] - torch.from_numpy(golden("new_logits64"))
    assert (shift - shift.mean()).abs().max() < 1e-5 * np.abs(golden("new_logits64")).max()  # one prior for all


@pytest.mark.parametrize("images", [1, 5, 80])
def test_new_classes_are_those_of_a_plain_inverse(images):
    """Whatever the width, and with fewer than 64 images as well."""
    g = torch.Generator().manual_seed(0)
    rows, texts = (normalize(torch.randn(n, 24, generator=g), dim=1) for n in (images, 3))
    k = min(64, images)
    precision, means = torch.zeros(24, 24, dtype=torch.float64), []
    for text in texts.double():
        near = rows.double()[(rows.double() @ text).topk(k).indices]
        means.append((near.sum(0) + 16 * text) / (k + 16))
        scatter = (near - text).T @ (near - text)
        trace = scatter.trace() / max(k - 1, 1)
        precision += 24 * torch.linalg.inv(scatter + trace * torch.eye(24)) / 3
    weight, bias = new_classes(texts, rows)
    close(weight, torch.stack(means) @ precision, 1e-6)
    close(bias, -np.log(3) - 0.5 * (torch.stack(means) @ precision * torch.stack(means)).sum(1), 1e-6)


def test_learned_classes_keep_their_weights(playground):
    """Alone, they are what was learned; beside new ones, their logits differ only by that."""
    backbone, train, test = playground
    base, new = train.few_shot(8, seed=1).base_new_split()
    model = create("gda-clip").fit(backbone, base)
    images = test.select(range(20))
    before = model.image_logits(images)[0]
    torch.testing.assert_close(model.with_classes(base.class_names).image_logits(images)[0], before)
    mixed = model.with_classes([*new.class_names, *base.class_names])
    torch.testing.assert_close(mixed.image_logits(images)[0][:, len(new.class_names) :], before)
    # through other classes and back again
    again = model.with_classes(new.class_names).with_classes(base.class_names)
    torch.testing.assert_close(again.image_logits(images)[0], before)


# -- unlabelled images ----------------------------------------------------------------------------------------------


@pytest.mark.claim("gda-clip", "whu-rs19, two encoders, no labels: EM over the images against zero-shot")
@pytest.mark.parametrize("encoder", ENCODERS)
def test_unlabelled_images_beat_zero_shot(shared, encoder, claim):
    """All 1,005 images of WHU-RS19 without a label: 81.3 to 95.9 % and 71.5 to 94.6 %."""
    x, y, t = features(shared, encoder)
    head = create("gda-clip").fit_features(x[:0], [], t, unlabelled=x)
    claim({"gda-clip": percent(head.logits(x), y) / 100, "zero-shot": percent(x @ t.T, y) / 100})
    assert percent(head.logits(x), y) > percent(x @ t.T, y) + 13


@pytest.mark.claim("gda-clip", "whu-rs19, four labelled images a class and others without labels: above either alone")
@pytest.mark.parametrize("encoder", ENCODERS)
def test_labels_and_unlabelled_images_together(shared, encoder):
    """Four labelled images a class and the others without labels: better than either alone, in the mean of seeds."""
    both, labels, unlabelled = [], [], []
    for seed in (1, 2, 3):
        c = Case(shared, encoder, f"s4_seed{seed}", "gda")
        x = c.x[c.test]
        head = create("gda-clip").fit_features(c.x[c.support], c.y[c.support], c.t, unlabelled=x)
        both.append(c.accuracy(head.logits(x)))
        labels.append(c.accuracy(c.fit("gda-clip").logits(x)))
        unlabelled.append(c.accuracy(create("gda-clip").fit_features(x[:0], [], c.t, unlabelled=x).logits(x)))
    assert np.mean(both) > np.mean(labels)
    assert np.mean(both) > np.mean(unlabelled)


def test_one_round_is_the_published_equations():
    g = torch.Generator().manual_seed(0)
    x, zero_shot = normalize(torch.randn(30, 6, generator=g), dim=1), torch.randn(30, 3, generator=g)
    weight, bias = mixture(x, zero_shot, 1.0, x[:0], torch.empty(0, 3), rounds=1)
    r, x = zero_shot.double().softmax(1), x.double()
    means = torch.stack([(r[:, c, None] * x).sum(0) / r[:, c].sum() for c in range(3)])
    scatters = [(r[:, c, None] * (x - means[c])).T @ (x - means[c]) / r[:, c].sum() for c in range(3)]
    sigma = torch.stack(scatters).mean(0)
    precision = 6 * torch.linalg.inv(29 * sigma + sigma.trace() * torch.eye(6))
    close(weight, means @ precision, 1e-6)
    close(bias, -np.log(3) - 0.5 * ((means @ precision) * means).sum(1), 1e-6)


# -- long tails -------------------------------------------------------------------------------------------------------


def long_tail(y: torch.Tensor, seed: int, most: int = 30, ratio: float = 0.05) -> torch.Tensor:
    """Row numbers of a support set whose classes, in random order, have 30 down to 2 images, geometrically."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(19)
    counts = [round(most * ratio ** (rank / 18)) for rank in range(19)]
    drawn = [rng.choice(np.flatnonzero(y == c), k, replace=False) for c, k in zip(order, counts, strict=True)]
    return torch.from_numpy(np.concatenate(drawn))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_long_tailed_support_sets(shared, encoder):
    """Far above zero-shot, and a covariance to which classes contribute alike beats the pooled one, mean over seeds."""
    x, y, t = features(shared, encoder)
    accuracy: dict[str, list[float]] = {"zero-shot": [], "pooled": [], "balanced": []}
    for seed in (1, 2, 3, 4, 5):
        rows = long_tail(y, seed)
        rest = torch.from_numpy(np.setdiff1d(np.arange(len(y)), rows))
        accuracy["zero-shot"].append(percent(x[rest] @ t.T, y[rest]))
        for covariance in ("pooled", "balanced"):
            head = create("gda-clip", covariance=covariance).fit_features(x[rows], y[rows], t)
            accuracy[covariance].append(percent(head.logits(x[rest]), y[rest]))
    mean = {key: np.mean(values) for key, values in accuracy.items()}
    assert mean["pooled"] > mean["zero-shot"] + 10
    assert mean["balanced"] > mean["pooled"] + 0.2


@pytest.mark.parametrize("covariance", ["pooled", "balanced", "balanced-pinv"])
def test_covariances_are_the_plain_ones(covariance):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=g, dtype=torch.float64), torch.tensor([0] * 20 + [1] * 12 + [2] * 8)
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    classes = [x[y == c].T.cov() for c in range(3)]
    if covariance == "pooled":
        sigma = (x - means[y]).T.cov()
    elif covariance == "balanced":
        sigma = torch.stack([cov * (n - 1) / n for cov, n in zip(classes, (20, 12, 8), strict=True)]).mean(0)
    else:
        sigma = torch.stack(classes).mean(0)
    precision = 5 * torch.linalg.inv(39 * sigma + sigma.trace() * torch.eye(5))
    if covariance == "balanced-pinv":
        precision = torch.linalg.inv(sigma)
    close(gaussians(x, one_hot(y), covariance)[0], means @ precision, 1e-6)
