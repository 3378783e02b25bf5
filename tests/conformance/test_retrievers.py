"""What every retriever must do."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from PIL import Image

import clipadapt
from clipadapt.data import image_pairs
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from tests.conformance import doors, stand_ins  # noqa: F401 - register the methods
from tests.quick import brief, card, keys

KEYS = keys(task="retriever")


TEXTS = ["a photo of a cat", "the small red house", "a blue star"]


@pytest.fixture(scope="session")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(4)]


@pytest.fixture(scope="session")
def fitted(backbone, images):
    pairs = image_pairs(
        [(image, f"a {colour} star") for image, colour in zip(images, ["red", "blue"] * 2, strict=True)]
    )
    return cache(lambda key: brief(key).fit(backbone, pairs if card(key).signal == "pairs" else None))


@pytest.mark.parametrize("key", KEYS)
def test_unfitted_says_so(key, images):
    with pytest.raises(ClipadaptError, match="not fitted"):
        create(key).encode_images(images)


@pytest.mark.parametrize("key", KEYS)
def test_contract(key, fitted, images):
    """Features are unit rows in one space; ranks are those of their cosines, in both directions."""
    model = fitted(key)
    texts, pixels = model.encode_texts(TEXTS), model.encode_images(images)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([texts, pixels]), axis=1), 1, atol=1e-5)
    scores = (texts @ pixels.T).numpy()
    assert model.rank(TEXTS, images, k=2) == np.argsort(-scores, axis=1, kind="stable")[:, :2].tolist()
    assert model.rank(images, TEXTS, k=9) == np.argsort(-scores.T, axis=1, kind="stable").tolist()
    with pytest.raises(ClipadaptError, match="at least 1"):
        model.rank(TEXTS, images, k=0)


@pytest.mark.parametrize("key", KEYS)
def test_score_is_recall_at_1_of_both_directions(key, fitted, images):
    model = fitted(key)
    best = model.rank(TEXTS, images, k=1)
    pairs = image_pairs([(images[i], text) for (i,), text in zip(best, TEXTS, strict=True)])
    owner = [number for number, captions in enumerate(pairs.captions) for _ in captions]
    texts = [caption for captions in pairs.captions for caption in captions]
    scores = (model.encode_texts(texts) @ model.encode_images(pairs.items).T).numpy()  # captions x images
    to_image = np.mean(scores.argmax(1) == owner)
    to_text = np.mean(np.array(owner)[scores.argmax(0)] == np.arange(len(pairs)))
    assert model.score(pairs) == pytest.approx((to_image + to_text) / 2)


@pytest.mark.parametrize("key", KEYS)
def test_saved_and_loaded_is_equal(key, backbone, fitted, images, tmp_path):
    loaded = clipadapt.load(fitted(key).save(tmp_path / "model"), backbone)
    assert loaded.rank(TEXTS, images) == fitted(key).rank(TEXTS, images)
