"""The model before training passes on the mean of its trunk's patches, in the space that a classifier spans."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from clipadapt.backbones import load_backbone
from clipadapt.backbones.trunk import HEAD, LITE0, STEM
from clipadapt.training.embedded.lessons import Lessons
from clipadapt.training.embedded.start import joint_space, new_embedded, warm_texts
from clipadapt.training.embedded.teacher import unit
from tests.official_trunk import Official

ANIMALS = ["dog", "cat", "horse", "cow", "fish", "bird", "mouse", "bear"]
SIZES = {"image_size": 96, "width": 32, "layers": 2, "text_width": 32, "text_layers": 1, "text_heads": 2}


@pytest.fixture(scope="module")
def weights():
    official = Official(LITE0, STEM, HEAD)
    official(torch.zeros(1, 3, 32, 32))
    classifier = torch.randn(40, HEAD, generator=torch.Generator().manual_seed(2))
    return official.weights | {"_fc.weight": classifier}


@pytest.fixture(scope="module")
def start(weights):
    return new_embedded(weights, torch.full((HEAD,), 0.1), load_backbone().tokenizer, **SIZES)


def test_directions_are_those_in_which_the_classes_differ(weights):
    space = joint_space(weights["_fc.weight"], 8)
    torch.testing.assert_close(space @ space.T, torch.eye(8), rtol=0, atol=1e-5)
    centred = weights["_fc.weight"] - weights["_fc.weight"].mean(0)
    kept = (centred @ space.T).square().sum()
    others = torch.linalg.qr(torch.randn(HEAD, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert kept > 2 * (centred @ others).square().sum()


def test_a_feature_is_nearly_the_mean_of_the_patches(start):
    pixels = torch.rand(6, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    patches = start.encode_patches(pixels)
    assert patches.shape == (6, 32, 3, 3)
    # of patches as they are in photos: each different, with a mean that says what the image shows
    patches = (
        torch.randn(6, 32, 1, 1, generator=torch.Generator().manual_seed(3)) + patches.roll(1, 0) / patches.std() / 2
    )
    cosines = cosine_similarity(start.encode_images(patches), patches.mean((2, 3)))
    assert cosines.min() > 0.7


def test_projection_centres_what_the_trunk_sees(start, weights):
    """Pooled features equal to the given mean lie in the origin."""
    trunk = start.model.vision_model.embeddings.patch_embedding
    projected = trunk.projection(torch.full((1, HEAD, 1, 1), 0.1))
    torch.testing.assert_close(projected, torch.zeros_like(projected), rtol=0, atol=1e-5)


def test_it_is_a_whole_backbone(start, tmp_path):
    assert start.capabilities == {
        *("texts", "patches", "prompts", "attention", "gradients", "weights", "causal-text", "class-token", "trunk")
    }
    assert start.logit_scale == pytest.approx(20, rel=1e-6)
    start.save(tmp_path / "start")
    assert load_backbone(tmp_path / "start").fingerprint == start.fingerprint
    assert (start.preprocess.mean[0] * 255, start.preprocess.std[0] * 255) == pytest.approx((127, 128))


def test_texts_begin_in_closed_form(start):
    """Texts of the same words go to about the same place at once, and lessons are met far better than at random."""
    backbone, rng = start.copy(), np.random.default_rng(0)
    tokens = backbone.tokenizer.convert_ids_to_tokens(range(len(backbone.tokenizer)))
    seeds = [zlib.crc32(token.removesuffix("</w>").encode()) for token in tokens]
    words = np.stack([np.random.default_rng(seed).normal(size=40) for seed in seeds]).astype(np.float32)
    names = [" ".join(rng.choice(ANIMALS, 2, replace=False)) for _ in range(300)]
    place = {name: unit(rng.normal(size=32)) for name in ANIMALS}
    targets = np.stack([unit(sum(place[word] for word in name.split())) for name in names]).astype(np.float32)
    lessons = Lessons([[name] for name in names], [None] * 300, targets, np.full(300, 1 / 300))
    before = agreement(backbone, names, targets)
    warm_texts(backbone, words, lessons, texts=200)
    assert agreement(backbone, names, targets) > 0.8 > 0.3 > before
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def agreement(backbone, names, targets):
    features = backbone.encode_texts([f"a photo of a {name}." for name in names])
    return (features * torch.from_numpy(targets)).sum(1).mean()
