"""Groups of images: the colours that were drawn, named by colour, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from clipadapt.embeddings import Embeddings
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.search import clusters, find_clusters, name_clusters, read_words
from tests.search.conftest import COLOURS, PER_COLOUR


def test_colours_are_found_and_named(emb, embedded):
    embeddings = Embeddings(emb)
    found = find_clusters(embeddings, 3)
    assert [len(cluster.rows) for cluster in found] == [PER_COLOUR] * 3
    colours = [{COLOURS[row % 3] for row in cluster.rows} for cluster in found]
    names = name_clusters(found, embedded, ["blue", "red", "green", "yellow"], top=1)
    assert [{name} for (name,) in names] == colours
    for cluster in found:
        assert (np.diff(cluster.scores) <= 0).all()
        np.testing.assert_allclose(cluster.mean, embeddings.rows(cluster.rows).astype(np.float32).mean(0), atol=1e-3)


def test_every_image_is_in_one_group_whatever_the_blocks(noise, monkeypatch):
    embeddings = Embeddings(noise)
    found = find_clusters(embeddings)
    assert len(found) == 4  # the root of half of 30
    assert sorted(row for cluster in found for row in cluster.rows) == list(range(30))
    for first, second in zip(found, find_clusters(embeddings), strict=True):
        np.testing.assert_array_equal(first.rows, second.rows)
    monkeypatch.setattr(clusters, "_LEARNED", 10)  # centres of ten images, and all thirty assigned
    part = find_clusters(embeddings, 4)
    assert sorted(row for cluster in part for row in cluster.rows) == list(range(30))


def test_names_are_the_words_that_tell_a_group_from_the_others():
    class Words:
        def encode_texts(self, texts):
            import torch

            return torch.tensor([[0.9, 0.9] if "thing" in text else [1.0, 0.0] for text in texts])

    means = [np.array([1, 0], np.float32), np.array([0, 1], np.float32)]
    groups = [clusters.Cluster(np.arange(2), np.ones(2), mean) for mean in means]
    assert name_clusters(groups, Words(), ["thing", "x"], top=2) == [["x", "thing"], ["thing", "x"]]


def test_sizes_out_of_range(noise):
    for k in (1, 31):
        with pytest.raises(ClipadaptError, match="k must be from 2 to 30"):
            find_clusters(Embeddings(noise), k)


def test_words_of_a_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# animals\ncat\n\n dog \ncat\n", encoding="utf-8")
    assert read_words(file) == ["cat", "dog"]
    assert {"beach", "red", "a screenshot"} <= set(read_words())
    file.write_text("# none\n")
    with pytest.raises(DataError, match=r"words\.txt has no word"):
        read_words(file)
    with pytest.raises(DataError, match=r"missing\.txt cannot be read"):
        read_words(tmp_path / "missing.txt")
