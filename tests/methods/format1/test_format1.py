"""Models that clipadapt 0.1 saved in format 1, one of each kind, on the tiny CLIP: they load and predict as they did.

`expected.json` has what they predicted then on `colours(2, seed=2)`, how many numbers they had trained, and the
fingerprint of their image side. They were fitted on `colours(4, seed=1)` (`features-only` on the features below).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError
from tests.images import colours
from tests.tiny import tiny_clip

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
NAMES = sorted(EXPECTED.keys() - {"features-only"})
NEW = ["large cat", "house", "red"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def queries():
    return colours(2, seed=2)


@pytest.fixture(scope="module")
def loaded(backbone):
    return cache(lambda name: clipadapt.load(HERE / name, backbone))


def format_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["format"]


@pytest.mark.parametrize("name", NAMES)
def test_it_predicts_what_it_predicted(name, queries, loaded):
    model, expected = loaded(name), EXPECTED[name]
    assert format_of(HERE / name) == 1
    np.testing.assert_allclose(model.predict_proba(queries), expected["probabilities"], atol=1e-6)
    assert model.trained_parameters == expected["trained_parameters"]
    assert model.encoder.image_fingerprint == expected["image_fingerprint"]


@pytest.mark.parametrize("name", NAMES)
def test_it_serves_the_new_classes_that_it_served(name, queries, loaded):
    expected = EXPECTED[name]["new_classes"]
    if expected is None:
        with pytest.raises(ClipadaptError, match=r"classes that it has not learned|cannot be applied to new classes"):
            loaded(name).with_classes(NEW)
    else:
        np.testing.assert_allclose(loaded(name).with_classes(NEW).predict_proba(queries), expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_a_model_of_today(name, backbone, queries, loaded, tmp_path):
    folder = loaded(name).save(tmp_path / "model")
    assert format_of(folder) == 2
    again = clipadapt.load(folder, backbone)
    np.testing.assert_allclose(again.predict_proba(queries), EXPECTED[name]["probabilities"], atol=1e-6)
    assert again.trained_parameters == loaded(name).trained_parameters


def test_features_alone(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 16))
    x = centres[np.repeat(np.arange(3), 5)] + 0.3 * rng.standard_normal((15, 16))
    model = clipadapt.load(HERE / "features-only")
    for one in (model, clipadapt.load(model.save(tmp_path / "model"))):
        np.testing.assert_allclose(one.logits(x), EXPECTED["features-only"]["logits"], atol=1e-5)
        with pytest.raises(ClipadaptError, match="features, not images"):
            one.predict([])
