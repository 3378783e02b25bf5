"""Multi-Modal Adapter gives the figures of its official implementation, and what the paper's mask means for a row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu, linear, normalize

from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.feature_adapter import multi_modal_adapter
from clipadapt.methods.feature_adapter.multi_modal_adapter import BIAS, adapt, cosines, initial
from tests.golden import NAMES, Golden, assert_close, golden_backbone

S = 1 / 0.07


@pytest.fixture(scope="module")
def backbone(shared):
    return golden_backbone(shared)


@pytest.mark.parametrize(("variant", "text_ratio"), [("image_only", 0.0), ("image_text", 0.2)])
def test_the_official_code(shared, backbone, variant, text_ratio):
    golden = Golden(shared, "clip_mma", variant)
    texts = backbone.encode_texts([f"a photo of a {name}." for name in NAMES]).detach()
    images = backbone.encode_images(golden["pixels"]).detach()
    weights = {name.removeprefix("adapter."): golden[name].requires_grad_() for name in golden.names("adapter.")}
    assert_close(images, golden["image_features_normalized"])  # what goes in: CLIP's
    assert_close(texts, golden["text_features_normalized"])
    logits = S * cosines(weights, images, texts, BIAS["favour-cross"], 0.2, text_ratio)
    assert_close(logits, golden["logits"])
    loss = cross_entropy(logits, golden["labels"])
    assert_close(loss, golden["loss"])
    for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        assert_close(gradient, golden[f"grad/adapter.{name}"])


def test_the_added_mask_is_the_official_one(shared):
    mask = Golden(shared, "clip_mma")["attn_mask_example"]
    expected = torch.zeros(6, 6)
    expected[:5, 5] = expected[5, :5] = BIAS["favour-cross"]
    torch.testing.assert_close(mask, expected)


def plain(weights, images, texts, bias, ratio, text_ratio):
    """Every image with its own sequence [texts, image], its own mask and its own mixed texts."""
    attention = torch.nn.MultiheadAttention(128, 4, batch_first=True)
    mha = {n.removeprefix("mha."): w for n, w in weights.items() if n.startswith("mha.")}
    layer = {n: (weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in ("downsampler.0", "downsampler.1")}
    layer |= {n: (weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in ("upsampler.0", "upsampler.2")}
    across = torch.zeros(len(texts) + 1, len(texts) + 1, dtype=torch.bool)
    across[:-1, -1] = across[-1, :-1] = True
    if math.isinf(bias):
        mask = torch.zeros(across.shape).masked_fill(across != (bias > 0), -math.inf)
    else:
        mask = bias * across.float()
    out = []
    for x in images:
        rows = torch.cat([texts, x[None]])
        wide = linear(linear(rows, *layer["downsampler.0"]), *layer["downsampler.1"])[None]
        seen = functional_call(attention, mha, (wide, wide, wide), {"attn_mask": mask.to(wide)})[0][0]
        rows = linear(gelu(linear(seen, *layer["upsampler.0"])), *layer["upsampler.2"])
        t = normalize(text_ratio * normalize(rows[:-1], dim=1) + (1 - text_ratio) * texts, dim=1)
        out.append(normalize(ratio * normalize(rows[-1], dim=0) + (1 - ratio) * x, dim=0) @ t.T)
    return torch.stack(out)


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (9, 4))
    weights = {name: 2 * w for name, w in initial(16, seed=3).items()}  # larger, so that scores differ
    return weights, images, texts


@pytest.mark.parametrize("attention", BIAS)
@pytest.mark.parametrize("text_ratio", [0.0, 0.3, 1.0])
def test_the_savings_change_nothing(task, attention, text_ratio):
    """Figures and gradients of the plain computation, in double precision."""
    weights, images, texts = task
    weights = {name: w.double().requires_grad_() for name, w in weights.items()}
    images, texts = normalize(images.double(), dim=1), normalize(texts.double(), dim=1)
    results = []
    for compute in (cosines, plain):
        logits = compute(weights, images, texts, BIAS[attention], 0.4, text_ratio)
        loss = cross_entropy(10 * logits, torch.arange(9) % 4)
        results.append([logits, *torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-8)


def test_the_mask_leaves_a_text_one_key(task):
    """All texts of an image get one row, made of the image; the image's row is made of the texts."""
    weights, images, texts = task
    image_rows, text_rows = adapt(weights, images, texts, BIAS["cross"])
    assert text_rows.shape == (9, 1, 16)
    other_texts = adapt(weights, images, texts.flip(1), BIAS["cross"])
    torch.testing.assert_close(other_texts[1], text_rows)
    assert (other_texts[0] - image_rows).abs().max() > 1e-3
    image_rows, text_rows = adapt(weights, images, texts, BIAS["within"])
    other = adapt(weights, images, texts.flip(1), BIAS["within"])
    torch.testing.assert_close(other[0], image_rows)
    torch.testing.assert_close(text_rows, text_rows[:1].expand_as(text_rows))
    assert (text_rows[0, 0] - text_rows[0, 1]).abs().max() > 1e-3


def test_no_share_is_clip(task):
    weights, images, texts = task
    torch.testing.assert_close(cosines(weights, images, texts, math.inf, 0.0, 0.0), images @ texts.T)


@pytest.mark.parametrize("attention", BIAS)
def test_chunks_of_images_change_nothing(task, attention, monkeypatch):
    _, images, texts = task
    labels = np.arange(9) % 4
    model = create("multi-modal-adapter", attention=attention, epochs=2).fit_features(images, labels, texts)
    whole = model.logits(images)
    monkeypatch.setattr(multi_modal_adapter, "_ROWS", 2 * texts.numel())
    torch.testing.assert_close(model.logits(images), whole, atol=1e-5, rtol=1e-5)


def test_unknown_attention():
    with pytest.raises(ClipadaptError, match=r"attention = 'both' is not one of 'cross', 'favour-cross', 'within'"):
        create("multi-modal-adapter", attention="both")
