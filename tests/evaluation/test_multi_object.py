"""Probes of several objects: the images are as said, the figures counted right, and the embedded model's biases."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import clipadapt
from clipadapt.backbones.published import PublishedFeatures
from clipadapt.errors import DataError
from clipadapt.evaluation.protocol import NotApplicable, protocol
from clipadapt.evaluation.protocols.multi_object import (
    KINDS,
    Layout,
    draw,
    image_probe,
    layouts,
    matching,
    text_of,
    text_probes,
)
from clipadapt.methods import create

WEIGHTS = (1.0, 0.6, 0.4, 0.3)  # of what is mentioned first, second, ...


class FirstMention:
    """A text tower that is a sum of words, the first the heaviest."""

    def encode_texts(self, texts):
        rows = torch.zeros(len(texts), len(KINDS))
        for row, text in zip(rows, texts, strict=True):
            for weight, phrase in zip(WEIGHTS, text.split(" and "), strict=False):
                row[KINDS.index(phrase.split(" ", 1)[1])] += weight
        return normalize(rows, dim=1)


def test_images_are_controlled():
    shown = layouts(200, 12, 3, seed=1)
    assert shown == layouts(200, 12, 3, seed=1) != layouts(200, 12, 3, seed=2)
    assert all(len(set(p.kinds)) == len(set(p.corners)) == 3 for p in shown)
    large = [p.corners[0] for p in shown]
    assert all(35 < large.count(corner) < 65 for corner in range(4)), "any corner may hold the large one"
    image = np.asarray(draw(Layout((0, 1), (0, 2)), KINDS, ("flat",), (1, 1), size=128)).astype(int)
    differs = (image != image[-1, 0]).any(2)
    assert differs[:80, :80].sum() > 3 * differs[84:, 84:].sum() > 300, "a large square, and a small diamond apart"
    assert not differs[82:, :80].any()
    assert not differs[:80, 82:].any()


def test_text_of():
    assert text_of(["arrow", "ring", "umbrella"]) == "an arrow and a ring and an umbrella"


def test_text_probes_see_the_first_mention():
    read, nearest = text_probes(FirstMention(), KINDS, 3, 400, seed=1)  # type: ignore[arg-type]
    assert nearest == [1.0, 0.0, 0.0]
    assert read[0] > 0.95
    assert len(read) == 3


def test_image_probe_tells_large_from_small():
    shown = layouts(800, 12, 3, seed=1)
    features = torch.zeros(800, 4 * 12)  # a place for each corner and kind; what is small is drowned
    for row, image in zip(features, shown, strict=True):
        for i, (kind, corner) in enumerate(zip(image.kinds, image.corners, strict=True)):
            row[12 * corner + kind] = 0.05 if i else 1.0
    noise = 0.3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    large, small = image_probe(normalize(features + noise, dim=1), shown)
    assert large > 0.5 > 0.4 > small
    clear, too = image_probe(normalize(features.sign(), dim=1), shown)
    assert min(clear, too) > 0.9


def test_matching_equals_a_plain_count():
    shown = layouts(30, 12, 3, seed=3)
    generator = np.random.default_rng(0)
    features = torch.zeros(30, 12)
    for row, image in zip(features, shown, strict=True):
        for i, kind in enumerate(image.kinds):
            row[kind] = (1.0, 0.5, 0.5)[i]
    features = normalize(features + 0.3 * torch.from_numpy(generator.random((30, 12))).float(), dim=1)
    tower, hits = FirstMention(), {"large first": [], "small replaced": [], "large last": []}
    for x, image in zip(features, shown, strict=True):
        large, middle, last = (KINDS[k] for k in image.kinds)
        for wrong in KINDS:
            if wrong not in (large, middle, last):
                for name, texts in {
                    "large first": ([large, middle, last], [wrong, middle, last]),
                    "small replaced": ([large, middle, last], [large, middle, wrong]),
                    "large last": ([last, middle, large], [large, middle, wrong]),
                }.items():
                    a, b = (x @ tower.encode_texts([text_of(t)])[0] for t in texts)
                    hits[name].append(bool(a > b))
    assert len(hits["large first"]) == 30 * 9
    found = matching(tower, features, shown, KINDS)  # type: ignore[arg-type]
    assert found == pytest.approx({name: fmean(values) for name, values in hits.items()})
    assert found["large first"] > found["large last"], "both biases help the wrong text"


def test_the_embedded_model():
    backbone = clipadapt.load_backbone()
    found = protocol("multi-object")(create("zero-shot"), backbone, None, 1, objects=2, pictures_shown=480, texts=400)
    figures = found.figures
    assert figures["named: large"] > figures["named: a small one"] + 0.1
    assert figures["image probe: large"] > figures["image probe: small"] + 0.1
    assert figures["drop"] > 0.05
    assert figures["drop"] == pytest.approx(figures["matching"] - figures["matching after re-ordering"])
    some = {"objects": 2, "pictures_shown": 60, "texts": 40}
    first, again = (protocol("multi-object")(create("zero-shot"), backbone, None, 1, **some) for _ in range(2))
    assert again.figures == first.figures


def test_what_cannot_be_probed():
    points = PublishedFeatures("points", {kind: np.eye(12)[i] for i, kind in enumerate(KINDS)})
    run = protocol("multi-object")
    with pytest.raises(NotApplicable, match="tokenizer"):
        run(create("zero-shot"), points, None, 1)
    with pytest.raises(NotApplicable, match="tip-adapter cannot be applied"):
        run(create("tip-adapter"), points, None, 1)
    backbone = clipadapt.load_backbone()
    for more in ({"objects": 1}, {"objects": 5}, {"objects": 3, "kinds": KINDS[:3]}):
        with pytest.raises(DataError, match="objects must be 2, 3 or 4"):
            run(create("zero-shot"), backbone, None, 1, **more)
