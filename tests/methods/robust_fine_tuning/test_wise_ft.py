"""WiSE-FT's line: zero-shot at one end, the wrapped method at the other, for whatever weight method it wraps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


INNER = {
    "fine-tune": {"epochs": 2, "lr": 1e-3, "min_scale": 1.0},
    "clip-lora": {"steps_per_shot": 3, "lr": 1e-2, "min_scale": 1.0},
}


@pytest.mark.parametrize("key", INNER)
def test_ends_of_the_line(backbone, key):
    support, queries = colours(3, seed=1), colours(2, seed=2)
    zero_shot = create("zero-shot").fit(backbone, support).predict_proba(queries)
    inner = create(key, **INNER[key]).fit(backbone, support).predict_proba(queries)
    assert np.abs(inner - zero_shot).max() > 0.01
    for alpha, expected in ((0.0, zero_shot), (1.0, inner)):
        model = create("wise-ft", method=create(key, **INNER[key]), alpha=alpha).fit(backbone, support)
        np.testing.assert_allclose(model.predict_proba(queries), expected, atol=1e-5)


def test_the_middle_is_the_mean_of_all_weights(backbone):
    support = colours(3, seed=1)
    inner = create("fine-tune", **INNER["fine-tune"])
    model = create("wise-ft", method=inner, alpha=0.5).fit(backbone, support)
    assert not hasattr(inner, "backbone_"), "the method that was given is a recipe; it stays unfitted"
    inner.fit(backbone, support)
    ours, tuned, original = (m.model.state_dict() for m in (model.backbone_, inner.backbone_, backbone))
    for name in ours:
        torch.testing.assert_close(ours[name], (tuned[name] + original[name]) / 2)
    head0 = create("zero-shot").fit(backbone, support).weight_
    torch.testing.assert_close(model.weight_, (head0 + inner.weight_) / 2)


def test_a_method_without_weights_is_refused(backbone):
    with pytest.raises(ClipadaptError, match="wise-ft interpolates weights, and tip-adapter changes none"):
        create("wise-ft", method="tip-adapter").fit(backbone, colours(2, seed=1))


HEADS = {"lp++": {}, "taskres": {"epochs": 20}, "coop": {"n_ctx": 2, "epochs": 5}}


@pytest.mark.parametrize("key", HEADS)
def test_a_linear_classifier_is_interpolated(backbone, key, tmp_path):
    """The paper's line for a linear classifier: logits are the mix of the two ends', since they are linear in it."""
    support, queries = colours(3, seed=1), colours(2, seed=2)
    zero_shot = create("zero-shot").fit(backbone, support).image_logits(queries)[0]
    inner = create(key, **HEADS[key]).fit(backbone, support).image_logits(queries)[0]
    assert (inner - zero_shot).abs().max() > 0.01
    for alpha in (0.0, 0.3, 1.0):
        model = create("wise-ft", method=create(key, **HEADS[key]), alpha=alpha).fit(backbone, support)
        expected = (1 - alpha) * zero_shot + alpha * inner
        torch.testing.assert_close(model.image_logits(queries)[0], expected, atol=1e-4, rtol=1e-4)
        assert model.changed() == {}
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    np.testing.assert_array_equal(loaded.predict_proba(queries), model.predict_proba(queries))


def test_the_inner_method_has_its_own_templates(backbone):
    support, queries = colours(3, seed=1), colours(2, seed=2)
    inner = create("clip-lora", templates="the small {}", **INNER["clip-lora"])
    model = create("wise-ft", method=inner, alpha=0.0).fit(backbone, support)
    zero_shot = create("zero-shot", templates="the small {}").fit(backbone, support)
    np.testing.assert_allclose(model.predict_proba(queries), zero_shot.predict_proba(queries), atol=1e-5)


def test_a_line_of_a_line(backbone):
    """A learned head stays a learned head where the wrapped method is itself a point of a line."""
    support, queries = colours(3, seed=1), colours(2, seed=2)
    half = create("wise-ft", method=create("fine-tune", **INNER["fine-tune"]), alpha=0.5)
    outer = create("wise-ft", method=half, alpha=0.5).fit(backbone, support)
    quarter = create("wise-ft", method=create("fine-tune", **INNER["fine-tune"]), alpha=0.25).fit(backbone, support)
    np.testing.assert_allclose(outer.predict_proba(queries), quarter.predict_proba(queries), atol=1e-5)
