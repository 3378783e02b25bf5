"""What every generator of texts must do."""

from __future__ import annotations

import pytest

import clipadapt
from clipadapt.data import as_items
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from tests.conformance import doors
from tests.conformance.doors import image
from tests.quick import keys

KEYS = keys(task="text-generator")


@pytest.fixture(scope="module")
def fitted(backbone):
    return doors.fitted(KEYS, backbone)


@pytest.mark.parametrize("key", KEYS)
def test_unfitted_says_so(key):
    with pytest.raises(ClipadaptError, match="not fitted"):
        create(key).predict([image(True)])


@pytest.mark.parametrize("key", KEYS)
def test_contract(key, fitted):
    texts = fitted[key].predict([image(True), image(False)])
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)
    assert fitted[key].predict([]) == []


@pytest.mark.parametrize("key", KEYS)
def test_score_is_the_measure_of_the_data(key, fitted):
    items = as_items([image(True), image(False)])
    texts = fitted[key].predict(items)
    data = doors.Labelled(items, [[texts[0].upper(), "else"], ["something else"]], [])
    assert fitted[key].score(data) == 0.5
    with pytest.raises(ClipadaptError, match="at least one item"):
        fitted[key].score(doors.Labelled([], [], []))


@pytest.mark.parametrize("key", KEYS)
def test_saved_and_loaded_is_equal(key, backbone, fitted, tmp_path):
    loaded = clipadapt.load(fitted[key].save(tmp_path / "model"), backbone)
    assert loaded.predict([image(True)]) == fitted[key].predict([image(True)])
