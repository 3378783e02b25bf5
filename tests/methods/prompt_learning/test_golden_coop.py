"""CoOp gives the figures of its official implementation: all six layouts, features, logits, loss, gradient."""

from __future__ import annotations

import pytest
import torch

from clipadapt.methods.prompt_learning.coop import ContextLearner
from clipadapt.methods.prompt_method import Batch
from tests.golden import NAMES, Golden, assert_close, golden_backbone


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("sharing", ["unified", "csc"])
def test_coop(shared, position, sharing):
    golden, backbone = Golden(shared, "coop", f"{position}_{sharing}"), golden_backbone(shared)
    learner = ContextLearner(backbone, NAMES, golden["ctx"], position)
    lengths = (golden["tokenized_prompts"] > 0).sum(1)
    assert torch.equal((learner.prompts.ids > 0).sum(1), lengths)
    assert_close(learner.prompts.encode(learner.context, normalize=False), golden["text_features"])
    images = backbone.encode_images(golden["pixels"])
    assert_close(learner.logits(images, learner.texts()), golden["logits"])
    loss, hits = learner.loss(Batch(torch.arange(4), golden["labels"], images, None))
    assert_close(loss, golden["loss"])
    assert torch.equal(hits, golden["logits"].argmax(1) == golden["labels"])
    loss.backward()
    assert_close(learner.context.grad, golden["grad_ctx"])
