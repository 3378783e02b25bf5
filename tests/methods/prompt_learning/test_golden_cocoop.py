"""CoCoOp gives the figures of its official implementation: shifts, features, logits, loss, every gradient."""

from __future__ import annotations

import pytest
import torch

import clipadapt
from clipadapt.methods.kinds import contexts
from clipadapt.methods.kinds.prompts import Batch
from tests.golden import NAMES, Golden, assert_close, golden_backbone
from tests.learners import bound, coop

OURS = {
    "ctx": "context",
    "meta_net.linear1.weight": "meta_net.0.weight",
    "meta_net.linear1.bias": "meta_net.0.bias",
    "meta_net.linear2.weight": "meta_net.2.weight",
    "meta_net.linear2.bias": "meta_net.2.bias",
}


@pytest.fixture
def setting(shared):
    golden, backbone = Golden(shared, "cocoop"), golden_backbone(shared)
    learner = bound("cocoop", backbone, NAMES, {ours: golden[theirs] for theirs, ours in OURS.items()})
    with torch.no_grad():
        images = backbone.encode_images(golden["pixels"])
    return golden, learner, images


def test_cocoop(setting):
    golden, learner, images = setting
    assert_close(learner.meta_net(images), golden["meta_bias"])
    shifted = learner.context + learner.meta_net(images)[:, None, None]
    assert_close(learner.prompts.encode(shifted, normalize=False), golden["text_features"])
    assert_close(learner.logits(images, learner.texts()), golden["logits"])
    loss, hits = learner.loss(Batch(torch.arange(3), golden["labels"], images, None))
    assert_close(loss, golden["loss"])
    assert torch.equal(hits, golden["logits"].argmax(1) == golden["labels"])
    loss.backward()
    parameters = dict(learner.named_parameters())
    assert set(parameters) == set(OURS.values())
    for theirs, ours in OURS.items():
        assert_close(parameters[ours].grad, golden[f"grad/{theirs}"])


@pytest.mark.parametrize("prompts", [1, 10, 1000])
def test_a_prediction_goes_through_few_prompts_at_a_time(setting, monkeypatch, prompts):
    golden, learner, images = setting
    monkeypatch.setattr(contexts, "PROMPTS", prompts)
    seen: list[int] = []
    texts_for = learner.texts_for
    monkeypatch.setattr(learner, "texts_for", lambda part: seen.append(len(part)) or texts_for(part))
    with torch.no_grad():
        assert_close(learner.logits(images, learner.texts()), golden["logits"])
        assert learner.logits(images[:0], learner.texts()).shape == (0, 5)
    assert seen == {1: [1, 1, 1], 10: [2, 1], 1000: [3]}[prompts]


def test_without_shift_it_is_coop(setting):
    golden, learner, images = setting
    with torch.no_grad():
        learner.meta_net[2].weight.zero_()
        learner.meta_net[2].bias.zero_()
    plain = coop(learner.backbone, NAMES, golden["ctx"])
    assert_close(learner.logits(images, learner.texts()), plain.logits(images, plain.texts()).detach())
    for each in (learner, plain):
        each.loss(Batch(torch.arange(3), golden["labels"], images, None))[0].backward()
    assert_close(learner.context.grad, plain.context.grad)


def test_an_image_is_judged_by_itself(setting):
    _, learner, images = setting
    together = learner.logits(images, learner.texts())
    alone = torch.cat([learner.logits(image[None], learner.texts()) for image in images])
    assert_close(alone, together.detach())


def test_the_method_makes_this_learner(shared):
    backbone = golden_backbone(shared)
    learner = clipadapt.create("cocoop").bind(backbone, NAMES)
    assert_close(learner.context, Golden(shared, "kgcoop", "Caltech101")["ctx_init"])  # "a photo of a"
    assert [tuple(p.shape) for p in learner.meta_net.parameters()] == [(2, 32), (2,), (128, 2), (128,)]
