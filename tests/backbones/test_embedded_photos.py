"""The model inside the package that knows photographs names the ones that scikit-learn brings."""

from __future__ import annotations

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from clipadapt.backbones import load_backbone
from clipadapt.backbones.loading import SHIPPED
from clipadapt.methods import create

CLASSES = ["airplane", "dog", "flower", "guitar", "pizza", "sailing boat", "temple", "wrist watch"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("embedded-photos")


def test_photos_are_named_without_any_training(backbone):
    photos = [Image.fromarray(load_sample_image(name)) for name in ("flower.jpg", "china.jpg")]
    model = create("zero-shot").fit(backbone, class_names=CLASSES)
    assert [CLASSES[label] for label in model.predict(photos)] == ["flower", "temple"]


def test_it_has_all_that_methods_ask_for_and_is_small(backbone):
    assert backbone.capabilities == {
        *("texts", "patches", "prompts", "attention", "gradients", "weights", "causal-text", "class-token", "trunk")
    }
    assert (backbone.source, backbone.family, backbone.image_size) == ("embedded-photos", "clip_trunk", (160, 160))
    assert sum(file.stat().st_size for file in SHIPPED["embedded-photos"].iterdir()) <= 25_000_000


def test_patches_may_be_kept_and_other_sizes_are_seen(backbone):
    photo = Image.fromarray(load_sample_image("china.jpg"))
    pixels = backbone.preprocess(photo)[None]
    kept = backbone.encode_images(backbone.encode_patches(pixels))
    assert (kept - backbone.encode_images(pixels)).abs().max() < 1e-6
    wide = backbone.encode_images(pixels[:, :, :128, :], tokens=True)
    assert wide.grid == (4, 5)
