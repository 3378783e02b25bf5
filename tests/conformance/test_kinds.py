"""The base carries the kinds that later methods need; see `stand_ins.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.data import image_pairs
from clipadapt.errors import ClipadaptError
from clipadapt.methods import TrainingData, create
from clipadapt.methods.registry import card
from tests.conformance import stand_ins  # noqa: F401 - registers the methods

LONG = "a photo of the small red house " * 4  # more than the 16 tokens that the tiny model takes


def test_a_kind_that_joins_another_has_its_facts():
    tpt = card("test-tpt")
    assert (tpt.kind, tpt.task, tpt.signal) == ("test-time", "classifier", "none")
    assert tpt.requires == {"texts", "prompts"}
    assert (card("test-long-clip").kind, card("test-long-clip").signal) == ("pretraining", "pairs")


# -- test time --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tpt(backbone, support):
    return create("test-tpt", lr=0.05).fit(backbone, class_names=support.class_names)


def test_images_are_adapted_to_one_by_one_and_leave_no_trace(tpt, queries):
    before = {name: value.clone() for name, value in tpt._bound.named_parameters()}
    together = tpt.predict_proba(queries)
    alone = np.concatenate([tpt.predict_proba([item]) for item in reversed(queries.items)])[::-1]
    np.testing.assert_array_equal(together, alone)
    for name, value in tpt._bound.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None
        assert not value.requires_grad


def test_no_update_is_the_plain_prompt(tpt, backbone, support, queries):
    plain = create("test-tpt", updates=0).fit(backbone, class_names=support.class_names)
    features = plain.encoder.encode(torch.stack([backbone.preprocess(item.open()) for item in queries.items]))
    texts = torch.stack([plain.encode_class(name) for name in support.class_names])
    expected = (backbone.logit_scale * features @ texts.T).softmax(1)
    np.testing.assert_allclose(plain.predict_proba(queries), expected, atol=1e-5)
    assert np.abs(tpt.predict_proba(queries) - plain.predict_proba(queries)).max() > 1e-3


def test_the_seed_draws_the_views(tpt, backbone, support, queries):
    other = create("test-tpt", lr=0.05, seed=2).fit(backbone, class_names=support.class_names)
    assert np.abs(tpt.predict_proba(queries) - other.predict_proba(queries)).max() > 1e-6


# -- pseudo-labels ----------------------------------------------------------------------------------------------------


def test_pseudo_labels_are_those_of_the_surest_images(backbone, support):
    method = create("test-upl", surest=2, epochs=1)
    zero_shot = create("zero-shot").fit(backbone, class_names=support.class_names)
    said = zero_shot.predict(support)
    seen = []
    prepared = method._prepare
    method._prepare = lambda model, data: seen.append(prepared(model, data)) or seen[-1]
    method.fit(backbone, unlabelled=support, class_names=support.class_names)
    (data,) = seen
    assert data.unlabelled is None
    assert data.support.counts == [min(2, int((said == c).sum())) for c in range(4)]
    sure = zero_shot.predict_proba(support).max(1)
    names = [item.digest() for item in support.items]
    for item, label in zip(data.support.items, data.support.labels, strict=True):
        row = names.index(item.digest())
        assert said[row] == label
        assert sure[row] >= np.sort(sure[said == label])[::-1][:2].min()


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_from_what_was_learned(backbone, support, queries, tmp_path):
    """Task after task, also across a save, ends where all classes at once do, since each has its own mean."""
    first, second = support.stream(tasks=2, seed=1)
    model = create("test-rapf").fit(backbone, first.data, task=first.name)
    means = model.means_.clone()
    model = clipadapt.load(model.save(tmp_path / "model"), backbone)
    model.fit(backbone, second.data, task=second.name)
    assert torch.equal(model.means_[:2], means)
    at_once = create("test-rapf").fit(backbone, support)
    columns = [model.class_names_.index(name) for name in support.class_names]
    np.testing.assert_allclose(model.predict_proba(queries)[:, columns], at_once.predict_proba(queries), atol=1e-6)
    assert model.score(queries) == at_once.score(queries)
    model.fit(backbone, second.data)
    assert model.class_names_ == second.data.class_names, "without a task, it starts again"
    assert len(model.means_) == 2


def test_images_of_earlier_classes_keep_their_names_in_a_later_task(backbone, support):
    first, _ = support.stream(tasks=2, seed=1)
    model = create("test-rapf").fit(backbone, first.data, task="one").fit(backbone, support, task="two")
    assert model.class_names_ == [
        *first.data.class_names,
        *(n for n in support.class_names if n not in first.class_names),
    ]
    at_once = create("test-rapf").fit(backbone, support)
    for name in support.class_names:
        mean = model.means_[model.class_names_.index(name)]
        torch.testing.assert_close(mean, at_once.means_[at_once.class_names_.index(name)])


def test_an_interrupted_task_does_not_go_on_as_that_of_another_stream(backbone, support, tmp_path):
    first, second = support.stream(tasks=2, seed=1)
    second_of = {}
    for name, start in (("whole", first.data), ("two images", first.data.select([0, 4]))):
        model = create("test-rapf").fit(backbone, start, task="one")
        data = TrainingData.of(second.data, None, None, None, "two").after(model.class_names_)
        second_of[name] = model._identity(backbone, data)
    assert second_of["whole"] != second_of["two images"]


# -- pre-training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pairs(support):
    names = [support.class_names[label] for label in support.labels]
    return image_pairs([(item, [f"a {name}", LONG + name]) for item, name in zip(support.items, names, strict=True)])


SETTINGS = {"length": 40, "steps": 3, "batch_size": 8, "lr": 1e-3}


@pytest.fixture(scope="session")
def long(backbone, pairs):
    lines = []
    return create("test-long-clip", **SETTINGS).fit(backbone, pairs, report=lines.append), lines


def test_it_leaves_an_ordinary_backbone_with_longer_texts(long, backbone, untouched, tmp_path):
    (model, lines), ends = long, [LONG + "red", LONG + "blue"]
    better = model.backbone_
    assert (better.context_length, backbone.context_length) == (40, 16)
    assert better.tokenize(ends).shape[1] > 16
    assert torch.equal(*backbone.encode_texts(ends)), "which the old one cuts"
    assert not torch.equal(*better.encode_texts(ends))
    assert backbone.fingerprint == untouched != better.fingerprint
    assert model.trained_parameters == sum(p.numel() for p in better.copy().model.parameters())
    assert [(line["step"], line["steps"]) for line in lines] == [(1, 3), (2, 3), (3, 3)]
    better.save(tmp_path / "plain")
    plain = load_backbone(tmp_path / "plain")
    assert plain.context_length == 40
    assert plain.fingerprint == better.fingerprint


def test_it_is_saved_and_loaded_like_any_method(long, backbone, pairs, support, tmp_path):
    model, _ = long
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    assert loaded.backbone_.fingerprint == model.backbone_.fingerprint
    assert loaded.trained_parameters == model.trained_parameters
    assert loaded.score(pairs) == model.score(pairs)
    classifier = model.with_classes(support.class_names)
    expected = create("zero-shot").fit(model.backbone_, class_names=support.class_names)
    np.testing.assert_array_equal(classifier.predict_proba(support), expected.predict_proba(support))


def test_it_learns_what_the_pairs_say(backbone, pairs):
    """The loss of the pairs falls; with a learning rate of zero, nothing but the structure changes."""
    losses = []
    create("test-long-clip", **SETTINGS | {"steps": 12, "batch_size": 16}).fit(
        backbone, pairs, report=lambda line: losses.append(line["loss"])
    )
    assert losses[-1] < losses[0] - 0.1
    still = create("test-long-clip", **SETTINGS | {"lr": 0.0}).fit(backbone, pairs)
    assert still.update_ == {}
    assert still.backbone_.context_length == 40


def test_pretraining_is_reproducible_and_goes_on(long, backbone, pairs, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(line):
        if line["step"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        create("test-long-clip", **SETTINGS).fit(backbone, pairs, report=interrupt, resume=tmp_path)
    model = create("test-long-clip", **SETTINGS).fit(backbone, pairs, resume=tmp_path)
    assert model.backbone_.fingerprint == long[0].backbone_.fingerprint
    assert not list(tmp_path.iterdir())


def test_what_is_not_pairs_is_refused(backbone, support, pairs):
    for wrong in (None, support, clipadapt.data.Pairs(["a cat"], [("a dog",)])):
        with pytest.raises(ClipadaptError, match="test-long-clip learns from images with captions"):
            create("test-long-clip").fit(backbone, wrong)
    with pytest.raises(ClipadaptError, match="fewer than the 64 of a batch"):
        create("test-long-clip", batch_size=64).fit(backbone, pairs)
