"""Hyper-parameters are chosen on training images that are put aside, as by hand; no test image is looked at."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import Split
from clipadapt.errors import DataError
from clipadapt.evaluation import choosing
from clipadapt.evaluation.choosing import SEED, with_chosen
from clipadapt.evaluation.protocol import protocol
from clipadapt.methods import create
from clipadapt.metrics.classification import accuracy
from tests.pictures import colours
from tests.tiny import tiny_clip

GRID = {"lr": ["x1", "x10", 1e30]}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def split() -> Split:
    train, test = colours(8, seed=1, noise=90), colours(4, seed=2, noise=90)
    domains = [["left", "right"][i % 2] for i in range(len(train))]
    return Split(replace(train, domains=domains), test, replace(test, domains=domains[: len(test)]))


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(choosing, "_KNOWN", {})


def by_hand(method, backbone, pool, support, rates):
    kept = [i for i, item in enumerate(pool.items) if item not in support.items]
    rest = pool.select(kept)
    assert len(rest) == len(pool) - len(support)
    found = {}
    for lr in rates:
        try:
            found[lr] = accuracy(rest.labels, replace(method, lr=lr, seed=SEED).fit(backbone, support).predict(rest))
        except FloatingPointError:
            found[lr] = 0.0
    return max(found, key=lambda lr: found[lr]), found


def test_the_choice_is_that_of_plain_fits(backbone, split):
    method, support = create("clip-adapter", epochs=3, seed=4), split.train.few_shot(2, seed=SEED)
    chosen, scores = with_chosen(method, backbone, split.train, support, {"epochs": [3], "lr": ["x1", "x100", 0.5]})
    rates = [method.lr, 100 * method.lr, 0.5]
    best, found = by_hand(method, backbone, split.train, support, rates)
    assert {json.loads(key)["lr"]: value for key, value in scores.items()} == pytest.approx(found)
    assert (chosen.lr, chosen.seed, chosen.epochs) == (best, 4, 3)


def test_the_first_of_equal_ones_and_a_choice_is_made_once(backbone, split, monkeypatch):
    fits = []
    monkeypatch.setattr(choosing, "fit", lambda m, b, s: (fits.append(m.lr), (m.fit(b, s), 0.0))[1])
    support = split.train.few_shot(2, seed=SEED)
    for seed in (1, 2):
        method = create("clip-adapter", epochs=1, seed=seed)
        chosen, scores = with_chosen(method, backbone, split.train, support, {"lr": [1e-12, 2e-12]})
        assert (chosen.lr, chosen.seed) == (1e-12, seed)
        assert len(set(scores.values())) == 1
    assert len(fits) == 2, "the choice is the same for all seeds"


def test_of_a_wrapped_method_and_of_one_that_has_nothing_to_choose(backbone, split):
    support = split.train.few_shot(2, seed=SEED)
    inner = create("clip-adapter", epochs=1)
    wrapped = create("wise-ft", method=create("fine-tune", epochs=1, lr=1e-4))
    chosen, scores = with_chosen(wrapped, backbone, split.train, support, {"lr": ["x2"]})
    assert (chosen.method.lr, list(scores)) == (2e-4, ['{"lr": 0.0002}'])
    plain = create("tip-adapter")
    assert with_chosen(plain, backbone, split.train, support, GRID) == (plain, {})
    with pytest.raises(DataError, match="training images beyond those learned from"):
        with_chosen(inner, backbone, support, support, GRID)
    with pytest.raises(DataError, match=r"choose: .*epochs"):
        with_chosen(inner, backbone, split.train, support, {"epochs": [-1]})


@pytest.mark.parametrize("key", ["few-shot", "base-to-new", "domains", "cross-dataset"])
def test_protocols_choose_without_the_test_part(backbone, split, key, monkeypatch):
    """The pool is the training part of what is learned, and the run is that of the method with the chosen value."""
    pools = []

    def spy(method, backbone, pool, support, grid):
        pools.append((pool, support))
        return with_chosen(method, backbone, pool, support, grid)

    run = protocol(key)
    monkeypatch.setitem(run.__globals__, "with_chosen", spy)
    more = {"targets": ["digits"]} if key == "cross-dataset" else {}
    more |= {"learned": ["right"]} if key == "domains" else {}
    method = create("coop", n_ctx=2, epochs=2)
    outcome = run(method, backbone, split, 3, shots=2, choose={"lr": ["x1", "x10"]}, **more)
    ((pool, support),) = pools
    train_ids = {id(item) for item in split.train.items}
    assert {id(item) for item in (*pool.items, *support.items)} <= train_ids
    assert pool.class_names == (split.train.class_names[:2] if key == "base-to-new" else split.train.class_names)
    assert len(pool) == {"base-to-new": 16, "domains": 16}.get(key, 32)
    scores = {json.loads(k)["lr"]: v for k, v in outcome.details["chosen"].items()}
    assert outcome.model.lr == max(scores, key=lambda lr: scores[lr])
    plain = run(replace(method, lr=outcome.model.lr), backbone, split, 3, shots=2, **more)
    assert outcome.figures == plain.figures


def test_names_of_new_classes_are_told_where_asked(backbone, split):
    run = protocol("base-to-new")
    method = create("sync-clip", epochs=1, batch_size=4)
    told = run(method, backbone, split, 1, shots=2, tell_new=True)
    assert told.model.new_classes == split.test.base_new_split()[1].class_names
    assert not run(method, backbone, split, 1, shots=2).model.new_classes
    assert np.isfinite(told.figures["harmonic"])
