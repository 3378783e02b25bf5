"""The curve's every point equals a `wise-ft` fitted for it, while images are decoded once and nothing is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.studies.wise_ft_curve import output_ensemble, wise_ft_curve
from clipadapt.methods import create
from tests.images import colours
from tests.tiny import tiny_clip

ALPHAS = [0.0, 0.3, 0.7, 1.0]

INNER = {
    "fine-tune": {"epochs": 6, "lr": 1e-3, "min_scale": 1.0},  # tower and head
    "clip-lora": {"steps_per_shot": 5, "lr": 1e-2, "min_scale": 1.0},  # both towers, head from texts
    "tecoa": {"epochs": 4, "lr": 1e-3},  # tower only
    "lp++": {},  # a head on frozen features
    "coop": {"n_ctx": 2, "epochs": 5},  # texts on frozen features
}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def sets():
    return {"near": colours(6, seed=2), "noisy": colours(6, seed=3, noise=110)}


@pytest.mark.parametrize("key", INNER)
def test_every_point_is_that_of_wise_ft(backbone, sets, key):
    support = colours(3, seed=1)
    model = create(key, **INNER[key]).fit(backbone, support)
    curve = wise_ft_curve(model, backbone, sets, ALPHAS, batch_size=5)
    assert curve.alphas == ALPHAS
    assert curve.weights.keys() == curve.outputs.keys() == sets.keys()
    for i, alpha in enumerate(ALPHAS):
        single = create("wise-ft", method=create(key, **INNER[key]), alpha=alpha).fit(backbone, support)
        for name, data in sets.items():
            assert curve.weights[name][i] == single.score(data)
    zero_shot = create("zero-shot").fit(backbone, support)
    for name, data in sets.items():
        assert curve.weights[name][0] == curve.outputs[name][0] == zero_shot.score(data)
        assert curve.weights[name][-1] == curve.outputs[name][-1] == model.score(data)
        logits = [m.image_logits(data)[0] for m in (zero_shot, model)]
        mixed = output_ensemble(*logits, 0.3).argmax(1).numpy()
        assert curve.outputs[name][1] == (mixed == np.array(data.labels)).mean()


@pytest.mark.parametrize("key", ["fine-tune", "lp++"])
def test_images_are_decoded_once_and_nothing_is_trained(backbone, sets, key, monkeypatch):
    model = create(key, **INNER[key]).fit(backbone, colours(3, seed=1))
    fresh = {"near": colours(6, seed=20 + len(key)), "far": colours(6, seed=40 + len(key))}  # in no cache yet
    before, mine = backbone.fingerprint, model.backbone_.fingerprint
    seen: list[object] = []
    transform = type(backbone.preprocess)
    original = transform.__call__
    monkeypatch.setattr(transform, "__call__", lambda self, image: seen.append(image) or original(self, image))
    monkeypatch.setattr("clipadapt.training.loop.train", None)
    wise_ft_curve(model, backbone, fresh, ALPHAS)
    assert len(seen) == sum(map(len, fresh.values()))
    assert (backbone.fingerprint, model.backbone_.fingerprint) == (before, mine)


def test_ready_for_a_curve_after_loading(backbone, sets, tmp_path):
    model = create("clip-lora", **INNER["clip-lora"]).fit(backbone, colours(3, seed=1))
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    assert wise_ft_curve(loaded, backbone, sets, ALPHAS) == wise_ft_curve(model, backbone, sets, ALPHAS)


def test_other_classes_are_judged_among_themselves(backbone):
    support = colours(3, seed=1).only(["red", "green"])
    other = {"other": colours(5, seed=4).only(["blue", "yellow"])}
    model = create("clip-lora", **INNER["clip-lora"]).fit(backbone, support)
    curve = wise_ft_curve(model, backbone, other, [0.0, 1.0])
    expected = [
        create("zero-shot").fit(backbone, class_names=["blue", "yellow"]).score(other["other"]),
        model.with_classes(["blue", "yellow"]).score(other["other"]),
    ]
    assert curve.weights["other"] == expected
    tied = create("fine-tune", **INNER["fine-tune"]).fit(backbone, support)
    with pytest.raises(ClipadaptError, match="class of this model"):
        wise_ft_curve(tied, backbone, other)


def test_bad_input(backbone, sets):
    model = create("lp++").fit(backbone, colours(3, seed=1))
    for alphas in ([], [1.5], [-0.1]):
        with pytest.raises(ClipadaptError, match="alphas must be numbers"):
            wise_ft_curve(model, backbone, sets, alphas)
    for data in ({}, {"none": sets["near"].select([])}):
        with pytest.raises(ClipadaptError, match="images in each"):
            wise_ft_curve(model, backbone, data)
    other = backbone.copy()
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    with pytest.raises(ClipadaptError, match="was not fitted on"):
        wise_ft_curve(model, other, sets)
    with pytest.raises(ClipadaptError, match="tip-adapter changes none"):
        wise_ft_curve(create("tip-adapter").fit(backbone, colours(3, seed=1)), backbone, sets)
