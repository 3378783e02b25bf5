"""What every generator of images must do."""

from __future__ import annotations

import pytest

import clipadapt
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from tests.conformance import doors
from tests.conformance.doors import image
from tests.quick import keys

KEYS = keys(task="image-generator")


@pytest.fixture(scope="module")
def fitted(backbone):
    return doors.fitted(KEYS, backbone)


@pytest.mark.parametrize("key", KEYS)
def test_unfitted_says_so(key):
    with pytest.raises(ClipadaptError, match="not fitted"):
        create(key).generate([image(True)])


@pytest.mark.parametrize("key", KEYS)
def test_contract(key, fitted):
    """One RGB image for each prompt, drawn from the seed and its number alone."""
    made = fitted[key].generate(["a cat", "a dog"], seed=3)
    assert [one.mode for one in made] == ["RGB", "RGB"]
    again = fitted[key].generate(["a cat", "a dog"], seed=3)
    assert [a.tobytes() for a in made] == [b.tobytes() for b in again]
    assert made[0].tobytes() != fitted[key].generate(["a cat"], seed=4)[0].tobytes()
    with pytest.raises(ClipadaptError, match="list of prompts"):
        fitted[key].generate("a cat")


@pytest.mark.parametrize("key", KEYS)
def test_score_is_the_measure_of_the_paper(key, fitted):
    assert 0 <= fitted[key].score(["a cat"]) <= 1


@pytest.mark.parametrize("key", KEYS)
def test_saved_and_loaded_is_equal(key, backbone, fitted, tmp_path):
    loaded = clipadapt.load(fitted[key].save(tmp_path / "model"), backbone)
    assert loaded.generate(["a cat"])[0].tobytes() == fitted[key].generate(["a cat"])[0].tobytes()
