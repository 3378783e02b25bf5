"""What every detector must do."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import clipadapt
from clipadapt.data import as_items
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from tests.conformance import doors
from tests.conformance.doors import image
from tests.quick import keys

KEYS = keys(task="detector")


@pytest.fixture(scope="module")
def fitted(backbone):
    return doors.fitted(KEYS, backbone)


@pytest.mark.parametrize("key", KEYS)
def test_unfitted_says_so(key):
    with pytest.raises(ClipadaptError, match="not fitted"):
        create(key).predict([image(True)])


@pytest.mark.parametrize("key", KEYS)
def test_contract(key, fitted):
    """Boxes of each image, with labels into the class names and scores."""
    found = fitted[key].predict([image(True), image(False)])
    assert len(found) == 2
    for one in found:
        assert one.boxes.shape == (len(one.labels), 4)
        assert one.labels.shape == one.scores.shape
        assert set(one.labels) <= {0, 1}
        assert (one.boxes[:, 2:] >= one.boxes[:, :2]).all()
    assert fitted[key].predict([]) == []


@pytest.mark.parametrize("key", KEYS)
def test_score_is_ap50(key, fitted):
    items = as_items([image(True), image(True).transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    truth = fitted[key].predict(items)
    assert fitted[key].score(doors.Labelled(items, truth, ["dark", "bright"])) == 1
    with pytest.raises(ClipadaptError, match="in this order"):
        fitted[key].score(doors.Labelled(items, truth, ["bright", "dark"]))
    with pytest.raises(ClipadaptError, match="at least one image"):
        fitted[key].score(doors.Labelled([], [], ["dark", "bright"]))


def test_a_box_is_what_its_method_says(fitted):
    np.testing.assert_array_equal(fitted["test-detector"].predict([image(True)])[0].boxes, [[2, 1, 9, 4]])


@pytest.mark.parametrize("key", KEYS)
def test_needs_class_names(key, backbone):
    with pytest.raises(ClipadaptError, match="class_names"):
        create(key).fit(backbone)


@pytest.mark.parametrize("key", KEYS)
def test_saved_and_loaded_is_equal(key, backbone, fitted, tmp_path):
    loaded = clipadapt.load(fitted[key].save(tmp_path / "model"), backbone)
    np.testing.assert_array_equal(loaded.predict([image(True)])[0].boxes, fitted[key].predict([image(True)])[0].boxes)
