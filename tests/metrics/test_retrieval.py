"""Retrieval scores against a plain computation, scikit-learn where it has the measure, and cases done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score

from clipadapt.errors import ClipadaptError
from clipadapt.metrics.retrieval import image_to_image, image_to_text, retrieval_scores, text_to_image


def unit(seed, *shape):
    rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain(queries, gallery, relevant, ks, skip_self=False):
    """The definitions, one query at a time: {measure: value}."""
    firsts, precisions, gains = [], [], {k: [] for k in ks}
    for i, query in enumerate(queries):
        ranked = sorted(range(len(gallery)), key=lambda j: (-float(query @ gallery[j]), j))
        hits = [relevant(i, j) for j in ranked if not (skip_self and i == j)]
        if not any(hits):
            continue
        ranks = [rank for rank, hit in enumerate(hits, start=1) if hit]
        firsts.append(ranks[0])
        precisions.append(sum((n + 1) / rank for n, rank in enumerate(ranks)) / len(ranks))
        for k in ks:
            best = sum(1 / np.log2(1 + rank) for rank in range(1, min(k, len(ranks)) + 1))
            gains[k].append(sum(1 / np.log2(1 + rank) for rank in ranks if rank <= k) / best)
    recall = {k: np.mean([first <= k for first in firsts]) for k in ks}
    return len(firsts), recall, np.mean(precisions), {k: np.mean(g) for k, g in gains.items()}, np.median(firsts)


def assert_equal(scores, expected):
    queries, recall, precision, ndcg, median = expected
    assert scores.queries == queries
    assert scores.recall == pytest.approx(recall)
    assert scores.mean_average_precision == pytest.approx(precision)
    assert scores.ndcg == pytest.approx(ndcg)
    assert scores.median_rank == median


IMAGE_OF = np.array([3, 0, 0, 1, 2, 2, 2, 5, 5, 1])  # of ten captions; image 4 has none


def test_texts_and_images_find_each_other():
    texts, images = unit(0, 10, 6), unit(1, 6, 6)
    ks = (1, 3, 50)
    found = text_to_image(texts, images, IMAGE_OF, ks)
    assert_equal(found, plain(texts, images, lambda i, j: IMAGE_OF[i] == j, ks))
    found = image_to_text(torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(IMAGE_OF), ks)
    assert_equal(found, plain(images, texts, lambda i, j: IMAGE_OF[j] == i, ks))
    assert found.queries == 5


@pytest.mark.parametrize("cells", [1, 100, 1 << 24])
def test_images_find_their_class(cells):
    images, labels = unit(2, 25, 4), np.random.default_rng(3).integers(0, 5, 25)
    labels[7] = 99  # alone in its class: no query
    expected = plain(images, images, lambda i, j: labels[i] == labels[j], (1, 5, 10), skip_self=True)
    assert_equal(retrieval_scores(images, images, labels, labels, others=True, cells=cells), expected)
    assert_equal(image_to_image(images, labels), expected)


def test_agrees_with_scikit_learn():
    queries, gallery = unit(4, 12, 8), unit(5, 40, 8)
    groups, others = np.arange(12) % 4, np.arange(40) % 4
    found = retrieval_scores(queries, gallery, groups, others, ks=(7,))
    truth, scores = groups[:, None] == others, queries @ gallery.T
    expected = np.mean([average_precision_score(t, s) for t, s in zip(truth, scores, strict=True)])
    assert found.mean_average_precision == pytest.approx(expected)
    assert found.ndcg[7] == pytest.approx(ndcg_score(truth, scores, k=7))


def test_of_equal_scores_the_lower_number_ranks_first():
    same = np.ones((4, 1), np.float32)
    found = text_to_image(same, same, np.arange(4), ks=(1, 2))
    assert found.recall == {1: 0.25, 2: 0.5}
    assert found.median_rank == 2.5
    assert image_to_image(same, [0, 1, 1, 0], ks=(1, 2)).recall == {1: 0.25, 2: 0.75}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_of": [9] * 10}, "No query has anything relevant"),
        ({"image_of": [0.5] * 10}, "10 ints"),
        ({"image_of": [0]}, "10 ints"),
        ({"ks": (0,)}, "at least 1"),
        ({"texts": unit(0, 10, 5)}, "do not match"),
        ({"texts": np.full((10, 6), np.nan)}, "finite"),
    ],
)
def test_what_cannot_be_judged(change, message):
    given = {"texts": unit(0, 10, 6), "images": unit(1, 6, 6), "image_of": IMAGE_OF} | change
    with pytest.raises(ClipadaptError, match=message):
        text_to_image(**given)
