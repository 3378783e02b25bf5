"""X-MoRe: the official formulas computed plainly, the memory's forms, and when captions help."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.data import image_pairs
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.recipe import recipe
from clipadapt.methods.zero_shot_inference.x_more import confidence, mixed, retrieve
from tests.images import colours
from tests.tiny import tiny_clip

CAPTIONS = ["a red cat", "a green house", "the blue star", "a small circle", "a large red dog", "a photo of the dog"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


def random(*shape: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow(images, texts, weight, k, mixing):
    """The loop of the official script: one image after the other, entropies from log-probabilities."""
    classes, rows, sums = len(weight), [], [0.0, 0.0]
    for x in images:
        order = sorted(range(len(texts)), key=lambda i: -float(x @ texts[i]))[:k]
        p = (weight @ x).softmax(0)
        q = torch.stack([(weight @ texts[i]).softmax(0) for i in order]).mean(0)
        uniform = math.log(classes)
        first, second = (1 - float(-(d * d.log()).sum()) / uniform for d in (p, q))
        if mixing == "stream":
            sums = [sums[0] + first, sums[1] + second]
            first, second = first / sums[0], second / sums[1]
        if mixing == "equal":
            first = second = 1.0
        rows.append((first * p + second * q) / (first + second))
    return torch.stack(rows)


@pytest.mark.parametrize("mixing", ["confidence", "stream", "equal"])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_equals_the_plain_loop(backbone, mixing, k):
    model = create("x-more", memory=CAPTIONS, k=k, mixing=mixing).fit(backbone, class_names=["red", "green", "blue"])
    images = random(300, 16, seed=1)  # more than a block
    expected = slow(images, model.memory_["texts"], model.weight_, k, mixing)
    torch.testing.assert_close(model.logits(images).softmax(1), expected, atol=1e-5, rtol=1e-4)


def test_captions_of_neighbouring_images_are_ranked_by_the_image():
    images, texts, others = random(7, 8, seed=1), random(5, 8, seed=2), random(12, 8, seed=3)
    text_of = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 3, 4, 0, 1])
    rows, counts = retrieve(images, {"texts": texts, "images": others, "text_of": text_of}, 3, 4)
    for x, row, counted in zip(images, rows, counts, strict=True):
        near = sorted(range(12), key=lambda i: -float(x @ others[i]))[:4]
        captions = sorted({int(text_of[i]) for i in near}, key=lambda t: -float(x @ texts[t]))[:3]
        assert row[counted].tolist() == captions


def test_confidence_and_its_limits():
    p = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(confidence(p), torch.tensor([[1.0], [0.0], [0.5]]))
    sure, unsure = p[:1], p[1:2]
    torch.testing.assert_close(mixed(sure, unsure, "confidence"), sure, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed(unsure, sure, "confidence"), sure, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed(unsure, unsure, "confidence"), unsure)
    torch.testing.assert_close(mixed(sure, unsure, "equal"), (sure + unsure) / 2)


@pytest.mark.claim("x-more", "made-up features: the surer of image and captions weighs more than the other")
def test_the_surer_modality_decides_where_it_is_the_better_one(claim):
    """Sharp captions of the right class correct an image between two classes; equal weights do as well or worse."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4, 8)
    labels = torch.arange(1200) % 4
    blurred = normalize(centres[labels] + 0.9 * torch.randn(1200, 8, generator=generator), dim=1)
    captions = normalize(centres.repeat(5, 1) + 0.05 * torch.randn(20, 8, generator=generator), dim=1)
    model = create("x-more", k=3).fit_features(blurred[:0], [], centres, logit_scale=8.0, memory=captions)
    p, q = model.predictions(blurred)
    assert confidence(q).mean() > confidence(p).mean()

    def accuracy(probabilities: torch.Tensor) -> np.ndarray:
        return (probabilities.argmax(1) == labels).float().view(3, -1).mean(1).numpy()

    by_confidence = accuracy(mixed(p, q, "confidence"))
    claim({"x-more": by_confidence, "equal weights": accuracy(mixed(p, q, "equal")), "image": accuracy(p)})
    assert by_confidence.mean() >= accuracy(q).mean() - 0.01
    # the other way round: captions that say nothing leave the image's own prediction as it is
    noise = torch.full_like(q, 0.25)
    assert torch.equal(mixed(p, noise, "confidence").argmax(1), p.argmax(1))


def test_a_memory_is_needed(backbone):
    with pytest.raises(ClipadaptError, match="memory"):
        create("x-more").fit(backbone, class_names=["red", "green"])
    with pytest.raises(ClipadaptError, match="no caption"):
        create("x-more", memory=[]).fit(backbone, class_names=["red", "green"])
    with pytest.raises(ClipadaptError, match="A memory is"):
        create("x-more", memory=7).fit(backbone, class_names=["red", "green"])
    with pytest.raises(ClipadaptError, match="features as memory="):
        create("x-more").fit_features(torch.empty(0, 8), [], torch.eye(3, 8))
    with pytest.raises(ClipadaptError, match="memory must have shape"):
        create("x-more").fit_features(torch.empty(0, 8), [], torch.eye(3, 8), memory=torch.ones(2, 7))


def test_memories_of_images(backbone, tmp_path):
    data = colours(3, seed=5)
    captions = [f"a {data.class_names[label]} star" for label in data.labels]
    pairs = image_pairs(zip(data.items, captions, strict=True))
    for memory in (data, pairs):
        model = create("x-more", memory=memory, k=2, candidates=5).fit(backbone, class_names=data.class_names)
        assert len(model.memory_["texts"]) == 4
        assert model.predict_proba(data).shape == (12, 4)
        loaded = clipadapt.load(model.save(tmp_path / memory.name), backbone)
        torch.testing.assert_close(loaded.image_logits(data)[0], model.image_logits(data)[0])
        assert recipe(loaded)["hyperparameters"]["memory"] == memory.name
