"""KgCoOp gives the figures of its official implementation: teacher, features, logits, both terms, gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import clipadapt
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.methods.prompt_learning.kgcoop import distance
from tests.golden import NAMES, Golden, assert_close, golden_backbone
from tests.learners import bound

TEMPLATES = {"OxfordPets": "a photo of a {}, a type of pet.", "Caltech101": "a photo of a {}."}


@pytest.mark.parametrize("variant", TEMPLATES)
def test_kgcoop(shared, variant):
    golden, backbone = Golden(shared, "kgcoop", variant), golden_backbone(shared)
    settings = {"templates": TEMPLATES[variant], "weight": float(golden["W"])}
    learner = bound("kgcoop", backbone, NAMES, {"context": golden["ctx"]}, **settings)
    assert_close(learner.teacher, golden["teacher_text_features"])
    assert_close(learner.prompts.encode(learner.context, normalize=False), golden["text_features"])
    images = backbone.encode_images(golden["pixels"])
    assert_close(learner.logits(images, learner.texts()), golden["logits"])
    assert_close(distance(learner.texts(), learner.teacher), golden["score"])
    assert_close(cross_entropy(learner.logits(images, learner.texts()), golden["labels"]), golden["cross_entropy"])
    loss, hits = learner.loss(Batch(torch.arange(4), golden["labels"], images, None))
    assert_close(loss, golden["loss"])
    assert torch.equal(hits, golden["logits"].argmax(1) == golden["labels"])
    loss.backward()
    assert_close(learner.context.grad, golden["grad_ctx"])


def test_the_method_makes_this_learner(shared):
    """Official start values, weight and templates arrive where the figures above were taken."""
    golden, backbone = Golden(shared, "kgcoop", "OxfordPets"), golden_backbone(shared)
    method = clipadapt.create("kgcoop", templates=TEMPLATES["OxfordPets"], weight=2.5)
    learner = method.bind(backbone, NAMES)
    assert_close(learner.context, golden["ctx_init"])
    assert_close(learner.teacher, golden["teacher_text_features"])
    assert learner.of.weight == 2.5
    assert not learner.teacher.requires_grad
    assert [name for name, _ in learner.named_parameters()] == ["context"], "the teacher is not learned, nor saved"


def test_distance_is_half_of_the_papers():
    texts, teacher = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    assert_close(2 * distance(texts, teacher), (texts - teacher).square().sum(1).mean())


def test_other_classes_need_no_teacher(shared):
    """Sentences given for the learned classes alone do not stand in the way of new ones."""
    backbone = golden_backbone(shared)
    sentences = {name: [f"a photo of a {name}."] for name in NAMES[:3]}
    learner = clipadapt.create("kgcoop", templates=sentences).bind(backbone, NAMES[3:])
    assert learner.texts().shape == (2, 32)
