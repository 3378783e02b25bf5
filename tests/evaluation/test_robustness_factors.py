"""Images with one factor changed, cues in conflict, and the figures drawn from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.data import Playground, Split
from clipadapt.data.playground.drawing import KINDS
from clipadapt.data.playground.factors import (
    FACTORS,
    STYLES_SHOWN,
    cloths,
    cue_conflicts,
    factor_images,
    unknown_kinds,
)
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.evaluation.protocol import protocol
from clipadapt.evaluation.protocols.robustness_factors import TEST_SEED
from clipadapt.methods import create
from clipadapt.metrics.calibration import confidences, expected_calibration_error
from tests.images import colours

SOME = ["heart", "ring", "tree", "car", "ladder", "flag"]
CHANGES = {  # what of an image's look each factor may change
    "style": {"style"},
    "colour": {"colour"},
    "texture": {"texture"},
    "smaller": {"extent"},
    "larger": {"extent"},
    "position": {"centre"},
    "rotation": {"turn"},
    "partial view": {"centre"},
    "background": {"backdrop"},
    "darker": {"light"},
    "blocked": {"block"},
}


def looks(data) -> list:
    return [item.draw.args[0] for item in data.items]


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_changes_itself_alone(factor):
    plain, changed = (factor_images(SOME, 4, f, seed=5) for f in (None, factor))
    assert plain.labels == changed.labels
    for before, after in zip(looks(plain), looks(changed), strict=True):
        differing = {name for name in before._fields if getattr(before, name) != getattr(after, name)}
        assert differing == CHANGES[factor]
    apart = [
        np.abs(np.asarray(a.open()).astype(int) - np.asarray(b.open())).mean()
        for a, b in zip(plain.items, changed.items, strict=True)
    ]
    assert min(apart) > 0.5, "each change is seen"
    again = factor_images(SOME, 4, factor, seed=5)
    assert [item.digest() for item in again.items] == [item.digest() for item in changed.items]
    assert {item.digest() for item in plain.items}.isdisjoint(item.digest() for item in changed.items)


def test_what_the_factors_are():
    middle = [look.centre for look in looks(factor_images(SOME, 9))]
    assert np.abs(np.array(middle) - 0.5).max() < 0.031
    for look in looks(factor_images(SOME, 6, "style")):
        assert look.style not in STYLES_SHOWN
    extents = {f: [look.extent for look in looks(factor_images(SOME, 6, f))] for f in (None, "smaller", "larger")}
    assert max(extents["smaller"]) < min(extents[None]) < max(extents[None]) < min(extents["larger"])
    light, dark = (
        np.mean([np.asarray(item.open()).mean() for item in factor_images(SOME, 3, f).items]) for f in (None, "darker")
    )
    assert 0.2 < dark / light < 0.42


def test_each_kind_has_a_cloth_of_its_own():
    own = cloths(SOME)
    assert len(set(own.values())) == len(SOME)
    assert cloths(SOME[::-1]) == own
    for look in looks(factor_images(SOME, 5)):
        assert (look.colour, look.texture) == own[look.kind]
    worn = [(look.colour, look.texture) == own[look.kind] for look in looks(factor_images(SOME, 100, typical=0.7))]
    assert np.mean(worn) == pytest.approx(0.7 + 0.3 / 55, abs=0.05)
    with pytest.raises(DataError, match="55 cloths"):
        cloths(KINDS)


def test_images_do_not_hang_on_the_other_kinds():
    both = factor_images(["ring", "heart"], 2, "position"), factor_images(["heart", "ring"], 2, "position")
    assert {item.digest() for item in both[0].items} == {item.digest() for item in both[1].items}


def test_cues_in_conflict():
    data, worn = cue_conflicts(SOME, 10, seed=1)
    own, labels = cloths(SOME), np.array(data.labels)
    assert (labels != worn).all()
    for look, label, other in zip(looks(data), labels, worn, strict=True):
        assert look.kind == SOME[label]
        assert (look.colour, look.texture) == own[SOME[other]]
    for label in range(len(SOME)):
        assert sorted(np.unique(worn[labels == label], return_counts=True)[1].tolist()) == [2] * 5


def test_unknown_kinds_wear_known_cloths():
    items = unknown_kinds(SOME, 60)
    shown = [item.draw.args[0] for item in items]
    assert not {look.kind for look in shown} & set(SOME)
    assert {(look.colour, look.texture) for look in shown} == set(cloths(SOME).values())
    with pytest.raises(ClipadaptError, match="factor"):
        factor_images(SOME, 1, "stile")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


@pytest.fixture(scope="module")
def split() -> Split:
    world = Playground(kinds=SOME)
    return Split(world.dataset(1), world.dataset(1, seed=3), world.dataset(1, seed=2))


def run(backbone, split, method, seed=1, **more):
    return protocol("robustness-factors")(create(method), backbone, split, seed, **{"pictures": 3, "shots": 8, **more})


def test_figures(backbone, split):
    found = run(backbone, split, "zero-shot")
    model = create("zero-shot").fit(backbone, class_names=SOME)
    assert found.figures["accuracy"] == model.score(factor_images(SOME, 3, typical=0.9, seed=TEST_SEED))
    changed = {f: factor_images(SOME, 3, f, typical=0.9, seed=TEST_SEED) for f in FACTORS}
    for factor, data in changed.items():
        assert found.figures[f"on {factor}"] == model.score(data)
    assert found.figures["factors"] == pytest.approx(np.mean([found.figures[f"on {f}"] for f in FACTORS]))
    logits = torch.cat([model.image_logits(data)[0] for data in changed.values()])
    labels = [label for data in changed.values() for label in data.labels]
    assert found.figures["ece (factors)"] == pytest.approx(expected_calibration_error(*confidences(logits, labels))[0])
    conflicts, worn = cue_conflicts(SOME, 3, seed=TEST_SEED)
    said = model.predict(conflicts)
    shape, cloth = (said == np.array(conflicts.labels)).sum(), (said == worn).sum()
    assert found.figures["shape bias"] == pytest.approx(shape / (shape + cloth))
    assert found.details["cue conflicts"] == {"pictures": 18, "shape": shape, "cloth": cloth}
    top = [
        model.image_logits(d)[0].softmax(1).amax(1).numpy()
        for d in (factor_images(SOME, 3, typical=0.9, seed=TEST_SEED), unknown_kinds(SOME, 18, seed=TEST_SEED))
    ]
    above = np.mean([(k > u) + 0.5 * (k == u) for k in top[0] for u in top[1]])
    assert found.figures["auroc"] == pytest.approx(above, abs=1e-6)


def test_learning_where_cloths_tell_lowers_the_shape_bias(backbone, split):
    """The study's finding about fine-tuning; where cloths tell nothing, learning raises it."""
    before = run(backbone, split, "zero-shot").figures["shape bias"]
    typical = run(backbone, split, "linear-probe", typical=1.0).figures
    random = run(backbone, split, "linear-probe", typical=0.0).figures
    assert typical["accuracy"] > 0.9
    assert typical["shape bias"] < before - 0.2
    assert random["shape bias"] > typical["shape bias"] + 0.3


def test_other_data_are_refused(backbone, split):
    for test in (colours(1, seed=1), split.test.rename({"heart": "love"})):
        with pytest.raises(DataError, match="draws its own images"):
            run(backbone, Split(test, test, test), "zero-shot")
