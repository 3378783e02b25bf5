"""What every segmenter must do."""

from __future__ import annotations

import numpy as np
import pytest

import clipadapt
from clipadapt.data import as_items
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from tests.conformance import doors
from tests.conformance.doors import image
from tests.quick import keys

KEYS = keys(task="segmenter")


@pytest.fixture(scope="module")
def fitted(backbone):
    return doors.fitted(KEYS, backbone)


@pytest.mark.parametrize("key", KEYS)
def test_unfitted_says_so(key):
    with pytest.raises(ClipadaptError, match="not fitted"):
        create(key).predict([image(True)])


@pytest.mark.parametrize("key", KEYS)
def test_contract(key, fitted):
    """One map an image, in the image's own size; probabilities sum to 1 and agree with the map."""
    images = [image(True), image(False).resize((4, 5))]
    maps, proba = fitted[key].predict(images), fitted[key].masks_proba(images)
    assert [m.shape for m in maps] == [(6, 10), (5, 4)]
    assert [p.shape for p in proba] == [(2, 6, 10), (2, 5, 4)]
    for m, p in zip(maps, proba, strict=True):
        assert m.dtype == np.int64
        np.testing.assert_allclose(p.sum(0), 1, atol=1e-5)
        np.testing.assert_array_equal(p.argmax(0), m)
    assert fitted[key].predict([]) == []


@pytest.mark.parametrize("key", KEYS)
def test_score_is_mean_iou_of_the_whole_set(key, fitted):
    items = as_items([image(True), image(False)])
    truth = fitted[key].predict(items)
    assert fitted[key].score(doors.Labelled(items, truth, ["dark", "bright"])) == 1
    assert fitted[key].score(doors.Labelled(items, [1 - t for t in truth], ["dark", "bright"])) == 0
    with pytest.raises(ClipadaptError, match="in this order"):
        fitted[key].score(doors.Labelled(items, truth, ["bright", "dark"]))
    with pytest.raises(ClipadaptError, match="at least one image"):
        fitted[key].score(doors.Labelled([], [], ["dark", "bright"]))


def test_a_map_is_what_its_method_says(fitted):
    np.testing.assert_array_equal(fitted["test-segmenter"].predict([image(True)])[0][1:4, 2:9], 1)


@pytest.mark.parametrize("key", KEYS)
def test_needs_class_names(key, backbone):
    with pytest.raises(ClipadaptError, match="class_names"):
        create(key).fit(backbone)


@pytest.mark.parametrize("key", KEYS)
def test_saved_and_loaded_is_equal(key, backbone, fitted, tmp_path):
    loaded = clipadapt.load(fitted[key].save(tmp_path / "model"), backbone)
    for ours, again in zip(fitted[key].predict([image(True)]), loaded.predict([image(True)]), strict=True):
        np.testing.assert_array_equal(ours, again)
