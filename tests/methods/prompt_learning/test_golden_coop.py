"""CoOp gives the figures of its official implementation: all six layouts, features, logits, loss, gradient."""

from __future__ import annotations

import pytest
import torch

from clipadapt.methods.kinds.prompts import Batch
from tests.golden import NAMES, Golden, assert_close, golden_backbone
from tests.learners import bound


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("sharing", ["unified", "csc"])
def test_coop(shared, position, sharing):
    golden, backbone = Golden(shared, "coop", f"{position}_{sharing}"), golden_backbone(shared)
    context, settings = golden["ctx"], {"position": position, "class_specific": sharing == "csc"}
    learner = bound("coop", backbone, NAMES, {"context": context}, n_ctx=context.shape[-2], **settings)
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
