"""Lessons: what is taught of things, classes and the corpus's names, and how often."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.errors import DataError
from clipadapt.training.embedded.lessons import SHARES, Lessons, corpus_names, make_lessons, taught
from clipadapt.training.embedded.teacher import unit

CLASSES = ["n02084071", "n02012849"]  # dog, and the bird that is called crane
DIRECTIONS = unit(np.random.default_rng(0).normal(size=(2, 6)))


def encoder(texts):
    """Random features, the same for the same text."""
    return np.stack([unit(np.random.default_rng(zlib.crc32(text.encode())).normal(size=9)) for text in texts])


@pytest.fixture(scope="module")
def lessons(wordnet, corpus):
    return make_lessons(encoder, wordnet, CLASSES, DIRECTIONS, corpus, report=lambda line: None)


def test_a_class_is_taught_its_own_direction_and_a_thing_a_mapped_one(lessons, wordnet):
    rows = {tuple(names): row for row, names in enumerate(lessons.names)}
    np.testing.assert_allclose(lessons.targets[rows["dog", "domestic dog"]], DIRECTIONS[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(lessons.targets, axis=1), 1, atol=1e-6)
    assert lessons.explained[rows["lifting device",]] == "crane: lifts and moves heavy objects"
    assert lessons.explained[rows["a rocket",]] is None
    assert len(lessons.names) == len(wordnet.things) + 2 + 5  # four names and one caption of the corpus


def test_shares(lessons, wordnet):
    things, classes = len(wordnet.things), 2
    assert lessons.shares.sum() == pytest.approx(1)
    assert lessons.shares[:things].sum() == pytest.approx(SHARES["things"])
    assert lessons.shares[things + classes :].sum() == pytest.approx(SHARES["corpus"])
    rows = {names[0]: row for row, names in enumerate(lessons.names[:things])}
    assert lessons.shares[rows["dog"]] > lessons.shares[rows["crane"]] > lessons.shares[rows["animal"]]


def test_what_images_are_called(corpus):
    called = corpus_names(corpus)
    assert list(called) == ["dog", "crane", "star", "red apple", "a rocket"]
    assert called["dog"] == ["dog", "dog face"]


def test_batches_depend_on_seed_and_step_only(lessons):
    first, again = (lessons.batch(3, 8, 0, seed=1) for _ in range(2))
    assert first["text"] == again["text"]
    assert first["text"] != lessons.batch(4, 8, 0, seed=1)["text"]
    assert first["target"].shape == (8, 6)


def test_they_are_saved_whole_and_their_absence_is_named(lessons, tmp_path):
    with pytest.raises(DataError, match="holds no lessons"):
        Lessons.open(tmp_path)
    lessons.save(tmp_path)
    again = Lessons.open(tmp_path)
    assert again.names == lessons.names
    assert np.array_equal(again.targets, lessons.targets)
    assert again.batch(2, 8, 0, seed=0)["text"] == lessons.batch(2, 8, 0, seed=0)["text"]


def test_the_objective_is_least_where_every_text_is_where_it_is_to_be():
    generator = torch.Generator().manual_seed(0)
    target = normalize(torch.randn(8, 6, generator=generator), dim=1)
    there = taught({"text": target, "target": target})
    elsewhere = taught({"text": target.roll(1, 0), "target": target})
    assert there["far"] == pytest.approx(0, abs=1e-6)
    assert there["unlike"] == pytest.approx(0, abs=1e-6)
    assert elsewhere["far"] > 0.5
    assert elsewhere["unlike"] > 0.5
