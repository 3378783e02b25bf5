"""Weighing the logits of several backbones: the optimum is one, it helps on real features, and it saves no towers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.features import encode_images
from clipadapt.methods import create
from clipadapt.methods.analysis_evaluation.backbone_effects_study import (
    BackboneEffectsStudy,
    best_scales,
    combine,
    fit_scales,
    overlap,
)
from clipadapt.methods.artifact import NESTED
from tests.images import colours
from tests.methods.test_golden_features import ENCODERS, Case
from tests.tiny import tiny_clip, tiny_siglip


@pytest.fixture
def noisy():
    """Logits (3, 40, 4) that tell the labels (40,) ever less well."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    signal = torch.nn.functional.one_hot(labels, 4).double()
    noise = torch.randn(3, 40, 4, generator=g, dtype=torch.float64)
    return torch.tensor([2.0, 1.0, 0.0])[:, None, None] * signal + noise, labels


def test_the_scales_are_the_optimum(noisy):
    """No small change of any scale lowers the objective; one at zero could only fall below it."""
    logits, labels = noisy
    z = logits.log_softmax(2)

    def objective(a: torch.Tensor) -> float:
        return (cross_entropy(torch.tensordot(a, z, 1), labels) + (a - 1 / 3).square().sum() / 80).item()

    best = best_scales(logits, labels, 1 / 3)
    assert best[0] > best[1] > best[2] >= 0
    for b in range(3):
        for change in (-1e-3, 1e-3):
            moved = best.clone()
            moved[b] += change
            if moved[b] >= 0:
                assert objective(moved) > objective(best)


def test_a_backbone_that_is_always_wrong_gets_no_weight(noisy):
    logits, labels = noisy
    scales = best_scales(torch.stack([logits[0], -logits[0]]), labels, 0.5)
    assert scales[1] == 0
    assert scales[0] > 0.5


def test_temperature_undoes_a_scale(noisy):
    """Logits a hundred times too large get a temperature about a hundred times as high, and equal probabilities."""
    logits, labels = torch.cat([noisy[0][:1]] * 30, dim=1), noisy[1].repeat(30)
    temperatures, weights = fit_scales([logits[0], 100 * logits[0]], labels)
    assert (temperatures[1] / temperatures[0]).item() == pytest.approx(100, rel=0.02)
    both = combine([logits[0], 100 * logits[0]], temperatures, weights).softmax(1)
    alone = combine([logits[0]], *fit_scales([logits[0]], labels)).softmax(1)
    torch.testing.assert_close(both, alone, atol=5e-3, rtol=0)


def test_perfect_evidence_does_not_push_scales_to_infinity():
    logits = 20 * torch.eye(4)
    temperatures, weights = fit_scales([logits, logits], torch.arange(4))
    assert (temperatures > 0.4).all()
    assert (weights < 2).all()


@pytest.mark.claim(
    "backbone-effects-study", "whu-rs19: two encoders are above the better one and their uniform average"
)
@pytest.mark.parametrize("shots", [4, 16])
def test_two_encoders_on_whu(shared, shots, claim):
    """Zero-shot CLIP on WHU-RS19, mean of 3 seeds: above the better encoder and above their uniform average."""
    found: dict[str, list[float]] = {"best": [], "uniform": [], "fitted": [], "oracle": []}
    for seed in (1, 2, 3):
        cases = [Case(shared, encoder, f"s{shots}_seed{seed}", "gda") for encoder in ENCODERS]
        labels, support, test = cases[0].y, cases[0].support, cases[0].test
        logits = [100 * c.x @ c.t.T for c in cases]
        scales = fit_scales([one[support] for one in logits], labels[support])
        report = overlap([one[test].argmax(1) for one in logits], labels[test])
        fitted = combine([one[test] for one in logits], *scales)
        uniform = torch.stack([one[test].log_softmax(1) for one in logits]).mean(0)
        found["best"].append(100 * max(report["accuracy"]))
        found["oracle"].append(100 * report["oracle"])
        found["fitted"].append(cases[0].accuracy(fitted))
        found["uniform"].append(cases[0].accuracy(uniform))
    mean = {name: np.mean(values) for name, values in found.items()}
    named = {"backbone-effects-study": "fitted", "better encoder": "best", "uniform average": "uniform"}
    claim({name: np.array(found[key]) / 100 for name, key in named.items()})
    assert mean["fitted"] > mean["best"] + 0.4
    assert mean["fitted"] > mean["uniform"] + 0.8
    assert mean["oracle"] > mean["best"] + 4  # what an informed choice for each image could add


def test_overlap():
    report = overlap([[0, 1, 2, 0], torch.tensor([0, 0, 2, 0])], [0, 1, 2, 1])
    assert report == {"accuracy": [0.75, 0.5], "both": [[0.75, 0.5], [0.5, 0.5]], "only": [0.25, 0], "oracle": 0.75}


@pytest.mark.parametrize("method", ["zero-shot", "tip-adapter", "linear-probe"])
def test_two_backbones_saved_and_loaded(method, tmp_path):
    """Both towers count; the folder names the second one and holds none of its weights."""
    backbone, support, queries = load_backbone(tiny_clip()), colours(4, seed=1), colours(3, seed=2)
    model = create("backbone-effects-study", method=method, backbones=[str(tiny_siglip())]).fit(backbone, support)
    alone = [create(method).fit(b, support) for b in (backbone, load_backbone(tiny_siglip()))]
    each, kept = model.each_logits(queries)
    assert kept == list(range(12))
    for ours, other in zip(each, alone, strict=True):
        torch.testing.assert_close(ours, other.image_logits(queries)[0])
    torch.testing.assert_close(model.image_logits(queries)[0], combine(each, model.temperatures_, model.weights_))
    folder = model.save(tmp_path / "model")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000
    loaded = clipadapt.load(folder, backbone)
    np.testing.assert_array_equal(loaded.predict_proba(queries), model.predict_proba(queries))
    assert loaded.trained_parameters == model.trained_parameters == 4 + sum(m.trained_parameters for m in alone)
    report = model.overlap(queries)
    assert report["fitted"] == model.score(queries)
    assert report["oracle"] >= max(report["accuracy"])
    assert isinstance(loaded, BackboneEffectsStudy)
    config = json.loads((folder / "config.json").read_text())
    config["learned"]["inner_"][NESTED][1]["backbone"]["fingerprint"] = "0" * 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"model was adapted from the backbone .* is another one"):
        clipadapt.load(folder, backbone)


def test_images_that_trained_a_method_do_not_judge_it():
    """A cache knows its own images by heart; held out, the same labels at random give it no confidence."""
    backbone, support = load_backbone(tiny_clip()), colours(6, seed=1)
    shuffled = np.random.default_rng(0).permutation(support.labels).tolist()
    support = type(support)(support.items, shuffled, support.class_names)
    inner = create("tip-adapter", alpha=10.0, beta=2000.0)
    assert inner.fit(backbone, support).score(support) > 0.9
    model = create("backbone-effects-study", method=inner).fit(backbone, support)
    own = fit_scales([inner.image_logits(support)[0]], torch.tensor(shuffled))
    assert model.temperatures_[0] > 3 * own[0][0]


def test_one_image_a_class_leaves_nothing_to_fit():
    model = create("backbone-effects-study", method="tip-adapter", backbones=[str(tiny_siglip())])
    model.fit(load_backbone(tiny_clip()), colours(1, seed=1))
    assert model.temperatures_.tolist() == [1, 1]
    assert model.weights_.tolist() == [0.5, 0.5]


def test_val_is_the_evidence_where_it_is_given():
    backbone, support, val = load_backbone(tiny_clip()), colours(4, seed=1), colours(3, seed=2)
    inner = create("tip-adapter").fit(backbone, support)
    model = create("backbone-effects-study", method="tip-adapter").fit(backbone, support, val=val)
    expected = fit_scales([inner.image_logits(val)[0]], torch.tensor(val.labels))
    torch.testing.assert_close((model.temperatures_, model.weights_), expected)


def test_on_a_single_backbone_it_has_the_head_of_its_method():
    backbone, support, queries = load_backbone(tiny_clip()), colours(4, seed=1), colours(3, seed=2)
    model = create("backbone-effects-study", method="tip-adapter").fit(backbone, support)
    features = encode_images(model.encoder, queries).features
    torch.testing.assert_close(model.head.logits(features), model.image_logits(queries)[0])
    torch.testing.assert_close(model.logits(features), model.image_logits(queries)[0])
    pixels = torch.stack([backbone.preprocess(item.open()) for item in queries.items])
    torch.testing.assert_close(model.image_logits(pixels)[0], model.image_logits(queries)[0], atol=1e-4, rtol=0)
    pictured = create("backbone-effects-study", method="gc-clip").fit(backbone, support)
    assert pictured.head is None, "its method looks at pixels"


def test_bad_input():
    backbone, support = load_backbone(tiny_clip()), colours(2, seed=1)
    with pytest.raises(ClipadaptError, match="list of names"):
        create("backbone-effects-study", backbones=[3]).fit(backbone, support)
    model = create("backbone-effects-study", backbones=[str(tiny_siglip())]).fit(backbone, support)
    with pytest.raises(ClipadaptError, match="prepared for one backbone"):
        model.predict(torch.zeros(1, 3, 32, 32))
    assert model.head is None
    with pytest.raises(ClipadaptError, match="not at features"):
        model.logits(torch.ones(1, 16))
    with pytest.raises(ClipadaptError, match="in their order"):
        model.overlap(type(support)(support.items, support.labels, support.class_names[::-1]))
