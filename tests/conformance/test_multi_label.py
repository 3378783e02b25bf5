"""What every method must do whose card says that images may show several classes; the others must refuse them."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import numpy as np
import pytest
import torch

import clipadapt
from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import MultiLabelDataset, Playground
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.metrics.multilabel import best_threshold, f1_scores, mean_average_precision
from tests.conformance import stand_ins  # noqa: F401 - registers the methods
from tests.quick import brief, card, keys, quick

KEYS = keys(task="classifier", multi_label=True)
KINDS = ("cat", "house", "star", "drop")
KNOWN = ("square", "chair", "drop", "ring", "ladder", "envelope", "butterfly", "cat")  # to the embedded model


@pytest.fixture(scope="session")
def support() -> MultiLabelDataset:
    return Playground(size=32, kinds=KINDS, seed=1).multilabel(16)


@pytest.fixture(scope="session")
def queries() -> MultiLabelDataset:
    return Playground(size=32, kinds=KINDS, seed=2).multilabel(10)


@pytest.fixture(scope="session")
def fitted(backbone, support):
    return cache(lambda key: brief(key).fit(backbone, support))


@pytest.mark.parametrize("key", KEYS)
def test_contract(key, backbone, queries, fitted):
    model = fitted(key)
    assert model.multi_label_
    scores = model.image_logits(queries)[0]
    predicted, probabilities = model.predict(queries), model.predict_proba(queries)
    assert (predicted.shape, predicted.dtype) == ((10, 4), bool)
    assert probabilities.shape == (10, 4)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    np.testing.assert_array_equal(predicted, probabilities >= 0.5)
    np.testing.assert_array_equal(predicted, scores.numpy() >= model.threshold_)
    np.testing.assert_allclose(probabilities, torch.sigmoid(scores - model.threshold_))
    assert model.score(queries) == mean_average_precision(queries.targets, scores)
    one = backbone.preprocess(queries.items[0].open())[None]
    np.testing.assert_allclose(model.predict_proba(one), probabilities[:1], atol=1e-4)
    assert model.predict([]).shape == model.predict_proba([]).shape == (0, 4)


@pytest.mark.parametrize("key", KEYS)
def test_the_threshold_has_the_highest_f1_on_val_or_else_on_the_support_set(key, backbone, support, queries, fitted):
    model = fitted(key)
    assert model.threshold_ == best_threshold(support.targets, model.image_logits(support)[0])
    model = brief(key).fit(backbone, support, val=queries)
    assert model.threshold_ == best_threshold(queries.targets, model.image_logits(queries)[0])
    everything = f1_scores(queries.targets, np.ones((10, 4))).overall
    assert f1_scores(queries.targets, model.predict(queries)).overall >= everything


@pytest.mark.parametrize("key", KEYS)
def test_score_matches_classes_by_name(key, queries, fitted):
    """Whatever their order; those that the images do not show are left out; one label a image is a set of one."""
    model = fitted(key)
    turned = MultiLabelDataset(queries.items, [frozenset(3 - c for c in s) for s in queries.labels], list(KINDS[::-1]))
    assert model.score(turned) == model.score(queries)
    single = Playground(size=32, kinds=KINDS[:2], seed=3).dataset(2)
    targets = np.zeros((4, 4), dtype=bool)
    targets[range(4), single.labels] = True
    assert model.score(single) == mean_average_precision(targets, model.image_logits(single)[0])
    with pytest.raises(ClipadaptError, match="at least one image that shows a class"):
        model.score(MultiLabelDataset(queries.items[:1], [frozenset()], list(KINDS)))
    with pytest.raises(ClipadaptError, match="Unknown class of this model 'dog'"):
        model.score(dataclasses.replace(queries, class_names=["cat", "house", "star", "dog"]))


@pytest.mark.parametrize("key", KEYS)
def test_saved_and_loaded_is_equal(key, backbone, queries, fitted, tmp_path):
    model = fitted(key)
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    assert (loaded.multi_label_, loaded.threshold_) == (True, model.threshold_)
    np.testing.assert_array_equal(loaded.predict(queries), model.predict(queries))
    np.testing.assert_allclose(loaded.predict_proba(queries), model.predict_proba(queries), atol=1e-6)


@pytest.mark.parametrize("key", KEYS)
def test_order_of_classes_does_not_matter(key, backbone, support, queries, fitted):
    order = [2, 0, 3, 1]
    labels = [frozenset(order.index(c) for c in label) for label in support.labels]
    permuted = dataclasses.replace(support, labels=labels, class_names=[KINDS[c] for c in order])
    model = brief(key).fit(backbone, permuted)
    np.testing.assert_allclose(model.predict_proba(queries), fitted(key).predict_proba(queries)[:, order], atol=2e-3)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("shape", ["class in none", "class in all", "no class at all"])
def test_odd_support_sets(key, shape, backbone, support, queries):
    change = {"class in none": lambda s: s - {0}, "class in all": lambda s: s | {0}}.get(shape, lambda s: s)
    labels = [change(label) for label in support.labels]
    if shape == "no class at all":
        labels[:4] = [frozenset()] * 4
    model = brief(key).fit(backbone, dataclasses.replace(support, labels=labels))
    assert model.image_logits(queries)[0].isfinite().all()
    assert model.predict(queries).shape == (10, 4)


@pytest.mark.parametrize("key", KEYS)
def test_the_kind_of_labels_is_that_of_the_latest_fit(key, backbone, support, queries):
    model = brief(key).fit(backbone, support)
    single = Playground(size=32, kinds=KINDS, seed=1).dataset(2)
    model.fit(backbone, single)
    assert not model.multi_label_
    assert model.predict(queries).shape == (10,)
    with pytest.raises(ClipadaptError, match="gives each image one class"):
        model.score(queries)
    with pytest.raises(ClipadaptError, match="val must have labels of the same kind"):
        model.fit(backbone, single, val=support)


@pytest.mark.parametrize("key", KEYS)
def test_without_an_image(key, backbone, queries):
    none = MultiLabelDataset([], [], list(KINDS))
    if card(key).signal != "none":
        with pytest.raises(ClipadaptError, match="labelled images"):
            brief(key).fit(backbone, none)
        return
    model = brief(key).fit(backbone, none)
    assert model.score(queries) > 0
    with pytest.raises(ClipadaptError, match="no image to choose a threshold on"):
        model.predict(queries)
    model.fit(backbone, none, val=queries)
    assert model.predict(queries).shape == (10, 4)


@pytest.mark.parametrize("key", keys(task="classifier", multi_label=True, kind="features"))
def test_features_alone_suffice(key, tmp_path):
    rng = np.random.default_rng(0)
    targets = rng.random((30, 3)) < 0.4
    directions = rng.standard_normal((3, 16))
    x = targets @ directions + 0.3 * rng.standard_normal((30, 16))
    head = quick(key).fit_features(x, targets, directions, logit_scale=20.0)
    assert head.multi_label_
    assert mean_average_precision(targets, head.logits(x)) > 0.9
    assert head.threshold_ == best_threshold(targets, head.logits(x))
    loaded = clipadapt.load(head.save(tmp_path / "head"))
    assert (loaded.multi_label_, loaded.threshold_) == (True, head.threshold_)
    for wrong in (targets[:-1], targets[:, :2], targets + 1):
        with pytest.raises(ClipadaptError, match="labels must"):
            brief(key).fit_features(x, wrong, directions)


@pytest.mark.parametrize("key", keys(task="classifier", multi_label=False))
def test_the_others_refuse_several_labels_by_name(key, backbone, support):
    with pytest.raises(ClipadaptError, match=f"{re.escape(key)} learns from images of one class each"):
        create(key).fit(backbone, support)
    if card(key).kind == "features":
        with pytest.raises(ClipadaptError, match="one class each"):
            create(key).fit_features(np.eye(4), np.eye(4, dtype=bool), np.eye(4))


@pytest.fixture(scope="session")
def objects() -> tuple[Backbone, MultiLabelDataset, MultiLabelDataset, float]:
    """Images of one to three objects: a support set that shows each kind 16 times or more, others, and zero-shot."""
    world, backbone = Playground(kinds=KNOWN), load_backbone()
    support, test = world.multilabel(150, seed=1).few_shot(16, seed=1), world.multilabel(200, seed=2)
    return backbone, support, test, create("zero-shot").fit(backbone, support).score(test)


LEARNING = [
    pytest.param(key, marks=pytest.mark.claim(key, "images of several objects: above zero-shot"))
    for key in KEYS
    if card(key).trains
]


@pytest.mark.parametrize("key", LEARNING)
def test_beats_zero_shot_on_images_of_several_objects(key, objects):
    backbone, support, test, zero_shot = objects
    assert quick(key).fit(backbone, support).score(test) > zero_shot + 0.03
