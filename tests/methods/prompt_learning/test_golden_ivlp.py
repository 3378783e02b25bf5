"""IVLP: the prompted features and cross-entropy that the PromptSRC figures hold; depth, start values, new classes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Insertion, load_backbone
from clipadapt.methods import create
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.nn.prompts import visual_prompts
from tests.golden import Golden, assert_close, golden_backbone
from tests.images import colours
from tests.methods.prompt_learning.test_golden_promptsrc import VARIANTS, golden_learner
from tests.tiny import tiny_clip


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_cross_entropy(shared, variant):
    golden, backbone = Golden(shared, "promptsrc", variant), golden_backbone(shared)
    learner = golden_learner(golden, backbone, "ivlp")
    batch = Batch(torch.arange(4), golden["labels"], None, golden["pixels"])
    assert_close(learner.texts(), golden["text_features_normalized"])
    assert_close(learner.seen(batch), golden["image_features_normalized"])
    loss, _ = learner.loss(batch)
    assert_close(loss, golden["loss_ce"])
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in learner.parameters())


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_depth_is_at_most_that_of_each_tower(depth):
    backbone = load_backbone()  # 4 text blocks, 6 image blocks
    learner = create("ivlp", depth=depth, n_ctx=4, n_visual=3).bind(backbone, ["cat", "dog"])
    assert len(learner.textual) == min(depth, len(backbone.blocks("text")))
    assert len(learner.visual) == min(depth, len(backbone.blocks("vision")))
    assert {tuple(v.shape) for v in learner.textual} == {(4, backbone.width("text"))}
    assert {tuple(v.shape) for v in learner.visual} == {(3, backbone.width("vision"))}


def test_untouched_words_without_visual_tokens_are_the_zero_shot_prompt():
    """Vectors that are a prompt's own words, at the input alone, give the features of that prompt."""
    backbone = load_backbone()
    learner = create("ivlp", depth=1, n_ctx=2).bind(backbone, ["cat", "fire_truck"])
    sentences = ["a photo of a cat.", "a photo of a fire truck."]
    torch.testing.assert_close(learner.texts(), backbone.encode_texts(sentences), rtol=1e-4, atol=1e-5)


def test_new_classes_keep_what_was_learned():
    backbone, support = load_backbone(tiny_clip()), colours(2, seed=1)
    model = create("ivlp", epochs=1, min_scale=1.0).fit(backbone, support)
    swapped = model.with_classes(support.class_names[::-1])
    images, kept = model.image_logits(support)
    assert kept == list(range(8))
    torch.testing.assert_close(swapped.image_logits(support)[0], images.flip(1))


def test_loss_of_a_step_is_the_plain_cross_entropy():
    """One step at rate zero on all images, against the same prompts put in by hand, one text after the other."""
    backbone, support = load_backbone(tiny_clip()), colours(2, seed=1)
    lines: list[dict] = []
    model = create("ivlp", epochs=1, lr=0.0, batch_size=8, min_scale=1.0, n_ctx=2).fit(
        backbone, support, report=lines.append
    )
    first, *deeper = (model.learned_[f"textual.{j}"] for j in range(3))
    text = [Insertion(first, at=1), *(Insertion(v, at=1, layer=j) for j, v in enumerate(deeper, start=1))]
    visual, *later = (model.learned_[f"visual.{j}"] for j in range(3))
    pixels = torch.stack([backbone.preprocess(item.open()) for item in support.items])
    with torch.no_grad(), backbone.inserted(text=text, vision=visual_prompts(visual, later)):
        texts = torch.cat([backbone.encode_texts([f"a photo of a {name}."]) for name in support.class_names])
        logits = backbone.logit_scale * backbone.encode_images(pixels) @ texts.T
    expected = cross_entropy(logits, torch.tensor(support.labels))
    assert lines[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
