"""The bias audit: its figures against a plain recomputation, and that candidate labels shift what groups get."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest

import clipadapt
from clipadapt.backbones.published import PublishedFeatures
from clipadapt.data import Dataset, Split
from clipadapt.data.playground.drawing import Playground
from clipadapt.errors import DataError
from clipadapt.evaluation.protocol import NotApplicable, protocol
from clipadapt.evaluation.protocols.bias_audit import audit, candidate_lists, disparity
from clipadapt.methods import create

SETS = {"materials": ["paper", "chalk"], "places": ["a wall"], "round": ["circle", "sun"]}
KINDS = ("circle", "sun", "house", "tree", "key")


def test_lists_of_candidates():
    classes = ["a", "b", "c", "d"]
    found = candidate_lists(classes, {"x": ["p", "q"], "y": ["r"], "ab": ["a", "b"]})
    assert found == {
        "classes": classes,
        "+ x": [*classes, "p", "q"],
        "+ y": [*classes, "r"],
        "- ab": ["c", "d"],
        "all": [*classes, "p", "q", "r"],
    }, "all without x is + y"
    three = candidate_lists(classes, {"x": ["p"], "y": ["r"], "z": ["s"]})
    assert three["all without y"] == [*classes, "p", "s"]
    assert candidate_lists(classes, {}) == {"classes": classes}
    with pytest.raises(DataError, match="extra labels only or classes"):
        candidate_lists(classes, {"mixed": ["a", "p"]})
    with pytest.raises(DataError, match="fewer than two classes"):
        candidate_lists(classes, {"most": ["a", "b", "c"]})


def test_disparity():
    found = disparity({"x": 0.2, "y": 0.8, "z": 0.4})
    assert (found["highest"], found["lowest"]) == ("y", "x")
    assert found["difference"] == pytest.approx(0.6)
    assert found["ratio"] == pytest.approx(4)
    assert disparity({"x": 0.0, "y": 0.5})["ratio"] is None


def test_audit_equals_a_plain_count():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((90, 5)), rng.integers(-1, 5, 90)
    groups = [("young", "old", "older")[i] for i in rng.integers(0, 3, 90)]
    names, sets = ["a", "b", "c", "d", "e"], {"first": ["a", "b"], "absent": ["z"]}
    found = audit(logits.argmax(1), labels, groups, names, sets)
    values = {}
    for group in ("young", "old", "older"):
        mine = [i for i in range(90) if groups[i] == group]
        best = {i: max(range(5), key=lambda c: logits[i, c]) for i in mine}
        judged = [i for i in mine if labels[i] >= 0]
        values[group] = fmean(best[i] == labels[i] for i in judged)
        assert found["pictures"][group] == len(mine)
        assert found["accuracy"][group] == pytest.approx(values[group])
        assert found["error"][group] == pytest.approx(1 - values[group])
        for c, name in enumerate(names):
            assert found["rates"][name][group] == pytest.approx(fmean(best[i] == c for i in mine))
        assert found["sets"]["first"][group] == pytest.approx(fmean(best[i] < 2 for i in mine))
        assert found["sets"]["absent"][group] == 0
    gap = found["disparities"]["accuracy"]
    assert gap["difference"] == pytest.approx(max(values.values()) - min(values.values()))
    assert gap["ratio"] == pytest.approx(max(values.values()) / min(values.values()))
    assert gap["difference"] == pytest.approx(found["disparities"]["error"]["difference"])
    assert found["disparities"]["set absent"]["difference"] == 0


def test_chance_is_told_from_disparity():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 400)
    groups = np.array(["x", "y"])[rng.integers(0, 2, 400)].tolist()
    wrong = (labels + 1) % 4
    even = np.where(rng.random(400) < 0.3, wrong, labels)
    uneven = np.where(rng.random(400) < np.where(np.array(groups) == "x", 0.1, 0.5), wrong, labels)
    gaps = [audit(p, labels, groups, list("abcd"))["disparities"]["accuracy"] for p in (even, uneven)]
    assert gaps[0]["difference"] < gaps[0]["by_chance"]
    assert gaps[1]["difference"] > 2 * gaps[1]["by_chance"]
    # Where groups consist of different classes, the classes explain all, and chance allows for it.
    by_class = np.where(labels < 2, labels, wrong)
    groups = np.where(labels < 2, "x", "y").tolist()
    gap = audit(by_class, labels, groups, list("abcd"))["disparities"]["accuracy"]
    assert gap["difference"] == gap["by_chance"] == 1


def test_a_group_whose_labels_are_no_candidates():
    found = audit([0, 1, 0], [0, 1, -1], ["x", "x", "y"], ["a", "b"])
    assert found["accuracy"] == {"x": 1.0, "y": None}
    assert found["rates"]["a"] == {"x": 0.5, "y": 1.0}
    none = audit([0, 1], [-1, -1], ["x", "y"], ["a", "b"])
    assert none["disparities"]["accuracy"] is none["overall"]["accuracy"] is None
    with pytest.raises(DataError, match="at least one image"):
        audit([], [], [], ["a", "b"])


@pytest.fixture(scope="module")
def drawn() -> Split:
    """Five kinds of things, in three styles as groups."""
    worlds = [Playground(size=48, kinds=KINDS, styles=("flat", "chalk", "sketch"), seed=s) for s in (1, 2)]
    train, test = worlds[0].dataset(3), worlds[1].dataset(9)
    return Split(train, train, test)


def test_zero_shot_on_styles(drawn):
    backbone = clipadapt.load_backbone()
    found = protocol("bias-audit")(create("zero-shot"), backbone, drawn, 1, sets=SETS)
    assert list(found.details["audits"]) == ["classes", "+ materials", "+ places", "- round", "all"]
    plain = create("zero-shot").fit(backbone, class_names=drawn.test.class_names)
    hits = plain.predict(drawn.test) == np.array(drawn.test.labels)
    by_style = {s: hits[np.array(drawn.test.domains) == s].mean() for s in ("flat", "chalk", "sketch")}
    assert found.details["audits"]["classes"]["accuracy"] == pytest.approx(by_style)
    assert found.figures["accuracy"] == pytest.approx(hits.mean())
    assert found.figures["gap"] == pytest.approx(max(by_style.values()) - min(by_style.values()))
    # Removing classes: their images are given other labels, and count for no accuracy.
    fewer = found.details["audits"]["- round"]
    assert "circle" not in fewer["rates"]
    assert sum(sum(by_group.values()) for by_group in fewer["rates"].values()) == pytest.approx(3)
    # Adding labels can only take images from the classes, so no group gains accuracy.
    more = found.details["audits"]["all"]
    assert all(more["accuracy"][g] <= found.details["audits"]["classes"]["accuracy"][g] for g in by_style)
    taken = found.figures["materials (all)"]
    assert taken == pytest.approx(fmean(more["sets"]["materials"].values()))
    assert any(abs(v) > 0 for v in found.details["shifts"]["all"].values()), "candidate labels shift disparities"


def test_methods_that_take_new_classes_and_those_that_do_not(drawn):
    backbone, run = clipadapt.load_backbone(), protocol("bias-audit")
    found = run(create("kgcoop", epochs=150, lr=0.01), backbone, drawn, 1, shots=2, sets={"x": ["paper"]})
    assert {"gap", "gap (+ x)", "x (+ x)", "gap of x (+ x)"} <= found.figures.keys()
    with pytest.raises(NotApplicable, match="tip-adapter cannot be applied"):
        run(create("tip-adapter"), backbone, drawn, 1)


def test_groups_are_needed(drawn):
    data = Dataset(drawn.test.items, drawn.test.labels, drawn.test.class_names)
    points = PublishedFeatures("points", {name: np.eye(8)[i] for i, name in enumerate(KINDS)})
    with pytest.raises(DataError, match="no domains"):
        protocol("bias-audit")(create("zero-shot"), points, Split(data, data, data), 1)
