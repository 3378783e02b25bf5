"""Batches of drawings and photos, and the objective that holds fast what is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.losses.contrastive import contrast
from clipadapt.training.contrastive import train_contrastive
from clipadapt.training.embedded.lessons import Lessons
from clipadapt.training.embedded.patches import KeptPatches, keep_patches
from clipadapt.training.embedded.teacher import unit
from clipadapt.training.embedded.together import NEAR_IMAGE, NEAR_TEXT, Together, together
from clipadapt.training.recipe import Recipe

TAUGHT = ["dog", "crane", "animal"]


@pytest.fixture(scope="module")
def source(backbone, corpus, photos, wordnet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    keep_patches(backbone, corpus, photos, folder, views=1, photo_views=2, report=lambda line: None)
    targets = unit(np.random.default_rng(0).normal(size=(3, 32))).astype(np.float32)
    lessons = Lessons([[name] for name in TAUGHT], [None] * 3, targets, np.full(3, 1 / 3))
    classes = [wordnet.senses[one] for one in ("n02084071", "n02012849", "n00015388")]
    return Together(corpus, KeptPatches.open(folder), lessons, classes)


def test_a_batch(source):
    batch, again = (source.batch(1, 4, 0, seed=0) for _ in range(2))
    assert batch["text"] == again["text"]
    assert batch["image"].shape == (4, 32, 4, 4)
    held = batch["image_target"].any(1)
    assert held.tolist() == [False, False, False, True]  # one photo, behind three drawings
    pooled = unit(batch["image"].mean((2, 3)))
    np.testing.assert_allclose(batch["image_target"][3], pooled[3], atol=1e-6)
    for text, target in zip(batch["text"], batch["text_target"], strict=True):
        known = any(name in text for name in TAUGHT)
        assert not target.any() or known


def test_a_drawing_and_a_photo_of_one_name_are_in_one_group(source):
    for step in range(60):
        batch = source.batch(step, 4, 0, seed=0)
        if batch["text"][3].endswith("crane") and any("crane" in text for text in batch["text"][:3]):
            drawing = next(row for row in range(3) if "crane" in batch["text"][row])
            assert batch["groups"][3] == batch["groups"][drawing]
            return
    pytest.fail("no batch had both")


def test_what_has_no_target_is_not_held():
    generator = torch.Generator().manual_seed(0)
    image, text, target = (normalize(torch.randn(4, 6, generator=generator), dim=1) for _ in range(3))
    target[:3] = 0
    out = {"image": image, "text": text, "scale": torch.tensor(10.0)}
    terms = together(out | {"image_target": target, "text_target": torch.zeros(4, 6)})
    assert terms["contrast"] == contrast(out)
    torch.testing.assert_close(terms["image"], NEAR_IMAGE * (1 - image[3] @ target[3]))
    assert terms["text"] == 0
    assert NEAR_TEXT > 0


def test_training_moves_the_towers_and_leaves_the_trunk(source, backbone, tmp_path):
    start = backbone.copy()
    pixels = "vision_model.embeddings.patch_embedding"
    recipe = Recipe(
        steps=3, batch_size=4, precision="fp32", workers=0, ema_decay=0.5, learning_rate=1e-2, frozen=(pixels,)
    )
    trained = train_contrastive(start, source, recipe, tmp_path, objective=together)
    before, after = backbone.weights(), trained.weights()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(name.startswith(pixels) for name in moved)
    assert {"vision_model", "text_model"} <= {name.partition(".")[0] for name in moved}
