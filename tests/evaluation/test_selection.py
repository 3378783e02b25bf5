"""`select` judges methods inside the support set, within its budget, and says what it left out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import Playground
from clipadapt.data.splits import stratified_folds
from clipadapt.evaluation.selection import OverBudget, Trial, contenders, select, settings
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods import create, method_class
from clipadapt.metrics.classification import wilson
from tests.pictures import colours
from tests.tiny import tiny_clip

ONE = {"gda-clip": {"alpha": 1.0}}
FAST = ["tip-adapter", "gda-clip", "linear-probe"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def support():
    return colours(6, seed=1, noise=90)


def test_settings_are_all_combinations():
    space = method_class("tip-adapter").search_space
    combos = settings(method_class("tip-adapter"))
    assert len(combos) == len(space["alpha"]) * len(space["beta"])
    assert {(c["alpha"], c["beta"]) for c in combos} == {(a, b) for a in space["alpha"] for b in space["beta"]}
    assert settings(method_class("zero-shot")) == [{}]


def test_only_what_is_clearly_behind_is_dropped():
    leader = np.array([True] * 9 + [False])
    close, far = leader.copy(), ~leader
    close[0] = False
    assert contenders({0: leader, 1: close, 2: far}) == [0, 1]
    assert contenders({5: far}) == [5]


def test_figures_are_those_of_plain_cross_validation(backbone, support):
    selection = select(backbone, support, keys=FAST, folds=3, seed=7)
    assert selection.trials[0].key == "zero-shot"
    assert {t.key for t in selection.trials} == {"zero-shot", *FAST}
    assert selection.best.accuracy == max(t.accuracy for t in selection.trials)
    assert selection.skipped == []

    x = encode_images(backbone, support).features
    y, t = np.array(support.labels), encode_classes(backbone, support.class_names)
    for trial in selection.trials:
        correct = 0
        for held_out in stratified_folds(support.labels, 3, seed=7):
            train = np.setdiff1d(np.arange(len(y)), held_out)
            head = trial.create().fit_features(x[train], y[train], t, backbone.logit_scale)
            correct += int((head.logits(x[held_out]).argmax(1).numpy() == y[held_out]).sum())
        assert trial.accuracy == correct / len(y)
        assert trial.interval == wilson(correct, len(y))


def test_same_seed_same_choice(backbone, support):
    first, second = (select(backbone, support, keys=FAST, folds=3) for _ in range(2))
    assert [(t.key, t.hyperparameters, t.accuracy) for t in first.trials] == [
        (t.key, t.hyperparameters, t.accuracy) for t in second.trials
    ]


def test_towers_are_judged_too(backbone, support):
    selection = select(
        backbone, support, keys=["coop"], folds=2, budget=1e9, overrides={"coop": {"epochs": 2, "n_ctx": 2}}
    )
    assert [t.key for t in selection.trials] == ["zero-shot", "coop"]
    assert selection.trials[1].hyperparameters["epochs"] == 2
    assert selection.trials[1].trained_parameters == 2 * backbone.width("text")


def test_no_budget_leaves_zero_shot_and_names_the_rest(backbone, support):
    selection = select(backbone, support, keys=FAST, budget=0.0)
    assert selection.best.key == "zero-shot"
    assert {key for key, _ in selection.skipped} == set(FAST)
    assert all("no time was left" in reason for _, reason in selection.skipped)


def test_a_long_training_is_stopped_when_its_own_pace_shows_it(backbone, support):
    long = {"clip-lora": {"steps_per_shot": 10_000}}  # minutes, however fast the machine is
    selection = select(backbone, support, keys=["clip-lora"], budget=100.0, overrides=long)
    [(key, reason)] = selection.skipped
    assert key == "clip-lora"
    assert "it needs about" in reason


def test_one_image_a_class_cannot_be_judged(backbone, support):
    selection = select(backbone, support.few_shot(1))
    assert selection.best.key == "tip-adapter"
    assert selection.best.accuracy is None
    assert "one image per class" in selection.reason


def test_what_the_backbone_lacks_is_named(backbone, support, monkeypatch):
    monkeypatch.setattr(Backbone, "capabilities", property(lambda self: frozenset({"texts"})))
    selection = select(backbone, support, keys=["coop", "gda-clip"], folds=2)
    assert selection.skipped == [("coop", f"coop needs a backbone with prompts; {backbone.source} has texts.")]


def test_what_needs_more_than_its_share_gets_what_is_left(backbone, support, monkeypatch):
    """Six methods and 60 s: one that needs 40 s does not fit its first share of 30 s; the others take no time."""
    clock = SimpleNamespace(perf_counter=lambda: 1000.0)
    monkeypatch.setattr("clipadapt.evaluation.selection.time", clock)
    shares: list[tuple[str, float]] = []

    def judge(self, key: str, until: float) -> Trial:
        shares.append((key, until - clock.perf_counter()))
        if key == "slow" and shares[-1][1] < 40:
            raise OverBudget("it needs 40 s")
        return Trial(key, {}, 0.5, (0.4, 0.6), 0.0, 0)

    keys = ["slow", "a", "b", "c", "d", "e"]
    monkeypatch.setattr("clipadapt.evaluation.selection._Judge.__call__", judge)
    monkeypatch.setattr("clipadapt.evaluation.selection.order_of", lambda keys: keys)
    monkeypatch.setattr("clipadapt.evaluation.selection.sees_features", lambda key: True)
    selection = select(backbone, support, keys=keys, budget=60)
    assert [key for key, _ in shares] == ["zero-shot", *keys, "slow"]
    assert [share for _, share in shares[1:]] == [30, 36, 45, 60, 60, 60, 60]
    assert [t.key for t in selection.trials] == ["zero-shot", *keys]
    assert selection.skipped == []


def test_a_lead_that_may_be_chance_is_called_so(backbone, support):
    few = support.select([0, 1, 6, 7, 12, 13, 18, 19])
    assert "may be chance" in select(backbone, few, keys=FAST, folds=2).reason
    assert "did better than zero-shot" in select(backbone, support, keys=[]).reason


def test_accuracy_to_expect_where_classes_are_uneven(backbone, support):
    """With frequencies, the estimate is the mean of the classes' accuracies in these proportions."""
    frequencies = [10, 1, 1, 0]
    trial = select(backbone, support, keys=["gda-clip"], folds=3, frequencies=frequencies, overrides=ONE).trials[1]
    x = encode_images(backbone, support).features
    y, t = np.array(support.labels), encode_classes(backbone, support.class_names)
    hits = np.zeros(len(y))
    for held_out in stratified_folds(support.labels, 3, seed=1):
        train = np.setdiff1d(np.arange(len(y)), held_out)
        head = trial.create().fit_features(x[train], y[train], t, backbone.logit_scale)
        hits[held_out] = head.logits(x[held_out]).argmax(1).numpy() == y[held_out]
    by_class = [hits[y == c].mean() for c in range(4)]
    assert trial.accuracy == pytest.approx(np.average(by_class, weights=frequencies))
    low, high = trial.interval
    even = select(backbone, support, keys=["gda-clip"], folds=3, overrides=ONE).trials[1]
    assert high - low > even.interval[1] - even.interval[0], "uneven weights tell less"


def test_several_labels_are_judged_by_mean_average_precision(backbone):
    """Each trial's figure is the mean of plain fits and scores on the same folds."""
    support = Playground(kinds=("star", "cat", "heart", "house"), size=48).multilabel(24)
    told: list[str] = []
    keys = ["linear-probe", "tip-adapter", "zero-shot"]
    selection = select(backbone, support, keys=keys, folds=3, seed=7, budget=1e9, progress=told.append)
    assert [t.key for t in selection.trials] == ["zero-shot", "linear-probe"], "tip-adapter takes one label an image"
    for trial in selection.trials:
        scores = [trial.create().fit(backbone, train).score(rest) for train, rest in support.folds(3, 7)]
        assert trial.accuracy == pytest.approx(np.mean(scores), abs=1e-12)
        assert trial.interval is None
    tried = [
        np.mean([create("linear-probe", **s).fit(backbone, train).score(rest) for train, rest in support.folds(3, 7)])
        for s in settings(method_class("linear-probe"))
    ]
    assert selection.trials[1].accuracy == pytest.approx(max(tried), abs=1e-12)
    assert told[0].startswith("linear-probe: mAP")
    late = select(backbone, support, keys=keys, folds=3, budget=0.0)
    assert (late.best.key, late.skipped) == ("zero-shot", [("linear-probe", "no time was left")])
    assert "no method did better than zero-shot" in late.reason
