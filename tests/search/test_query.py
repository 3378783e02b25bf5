"""What is searched for: a plain weighted sum of unit features, for backbones and adapted models alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.methods import create
from clipadapt.search import query_vector
from tests.pictures import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def tiny():
    return load_backbone(tiny_clip())


def test_is_the_weighted_sum_of_unit_features(tiny):
    image = colours(1, seed=1).items[0].open()
    a, b, c = tiny.encode_texts(["a red cat", "a house", "a dog"])
    p = tiny.encode_images(tiny.preprocess(image)[None])[0]
    expected = torch.nn.functional.normalize(2 * a + b - 0.5 * c + 3 * p, dim=0).detach()
    found = query_vector(tiny, [("a red cat", 2), "a house"], images=[(image, 3.0)], minus=[("a dog", 0.5)])
    assert (found.dtype, found.shape) == (np.float32, (16,))
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-6, rtol=0)


def test_one_part_need_not_be_in_a_list(tiny):
    np.testing.assert_array_equal(query_vector(tiny, "a cat"), query_vector(tiny, ["a cat"]))
    image = Image.new("RGB", (32, 32), "red")
    np.testing.assert_array_equal(query_vector(tiny, images=image), query_vector(tiny, images=[image]))


@pytest.mark.parametrize("key", ["coop", "clip-lora"])
def test_adapted_models_encode_both_sides(tiny, key):
    settings = {"coop": {"epochs": 2, "n_ctx": 2, "lr": 0.3}, "clip-lora": {"steps_per_shot": 2, "lr": 1e-2}}
    model = create(key, **settings[key]).fit(tiny, colours(2, seed=1))
    image = colours(1, seed=2).items[0].open()
    text = query_vector(model, "a red cat")
    torch.testing.assert_close(torch.from_numpy(text), model.encode_texts(["a red cat"])[0].detach())
    assert np.abs(text - query_vector(tiny, "a red cat")).max() > 1e-3
    unchanged = np.allclose(query_vector(model, images=image), query_vector(tiny, images=image), atol=1e-6)
    assert unchanged == (key == "coop")


def test_what_makes_no_query_is_refused(tiny):
    with pytest.raises(ClipadaptError, match="needs a text or an image"):
        query_vector(tiny)
    with pytest.raises(ClipadaptError, match="cancel out"):
        query_vector(tiny, "a cat", minus="a cat")
    with pytest.raises(ClipadaptError, match="must not be blank"):
        query_vector(tiny, [" "])
    for weight in (0, -1, float("nan"), float("inf"), "2"):
        with pytest.raises(ClipadaptError, match="positive weight"):
            query_vector(tiny, [("a cat", weight)])
    with pytest.raises(DataError, match=r"missing\.jpg"):
        query_vector(tiny, images="missing.jpg")
