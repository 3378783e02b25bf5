"""ProGrad gives the figures of its official implementation: losses, both gradients, the projection, two SGD steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

import clipadapt
from clipadapt.errors import ClipadaptError
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.methods.prompt_learning.prograd import aligned
from clipadapt.nn.prompts import word_vectors
from clipadapt.training.loop import train
from tests.golden import NAMES, Golden, assert_close, golden_backbone
from tests.learners import bound

TEMPLATE = "a type of pet, a photo of a {}."


def setting(shared, variant, **more):
    golden, backbone = Golden(shared, "prograd", variant), golden_backbone(shared)
    settings = {"strength": float(golden["lambda"]), "temperature": float(golden["T"]), **more}
    settings |= {"templates": TEMPLATE, "n_ctx": len(golden["ctx"])}
    learner = bound("prograd", backbone, NAMES, {"context": golden["ctx"]}, **settings)
    with torch.no_grad():
        images = backbone.encode_images(golden["pixels"])
    return golden, learner, Batch(torch.arange(4), golden["labels"], images, None)


@pytest.mark.parametrize("variant", ["conflict_lambda1.0_T1.0", "conflict_lambda0.8_T2.0", "agree_lambda0.8_T2.0"])
def test_prograd(shared, variant):
    golden, learner, batch = setting(shared, variant)
    assert_close(learner.teacher, golden["zero_shot_text_features"])
    assert_close(learner.logits(batch.features, learner.teacher), golden["zero_shot_logits"])
    domain, general, logits = learner.losses(batch)
    assert_close(logits, golden["logits"])
    assert_close(domain, golden["xe_loss"])
    assert_close(general, golden["kl_loss"])
    gradient, direction = (
        torch.autograd.grad(each, learner.context, retain_graph=True)[0] for each in (domain, general)
    )
    assert_close(gradient, golden["grad_xe"])
    assert_close(direction, golden["grad_kl"])
    assert_close(cosine_similarity(gradient.flatten(), direction.flatten(), dim=0), golden["cosine"], 1e-4)

    used: list[torch.Tensor] = []

    def loss_of(_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss, hits = learner.loss(batch)
        used.append(torch.autograd.grad(loss, learner.context, retain_graph=True)[0])
        return loss, hits

    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    contexts: list[torch.Tensor] = []
    losses = train(
        loss_of,
        optimizer,
        [0, 1],
        after_step=lambda _: contexts.append(learner.context.detach().clone()),
    )
    assert_close(torch.tensor(losses[0]), golden["xe_loss"])  # what is reported is the cross-entropy
    for step in (1, 2):
        assert_close(used[step - 1], golden[f"step{step}/grad_used"])
        assert_close(contexts[step - 1], golden[f"step{step}/ctx"])


def test_a_projected_gradient_never_opposes(shared):
    torch.manual_seed(0)
    for strength in (0.0, 0.8, 1.0):
        for _ in range(20):
            gradient, general = torch.randn(2, 3, 7).unbind(0)
            before, after = (gradient * general).sum(), (aligned(gradient, general, strength) * general).sum()
            expected = before if before >= 0 else (1 - strength) * before
            torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(aligned(gradient, torch.zeros(3, 7), 1.0), gradient), "no direction, nothing to oppose"


def test_strength_zero_is_coop(shared):
    golden, learner, batch = setting(shared, "conflict_lambda1.0_T1.0", strength=0.0)
    learner.loss(batch)[0].backward()
    assert_close(learner.context.grad, golden["grad_xe"])


def test_prompts_that_exceed_the_memory_give_the_same_gradient(shared):
    golden, learner, batch = setting(shared, "conflict_lambda1.0_T1.0")
    learner.prompts.encoder = learner.backbone.prompt_encoder(learner.prompts.ids, memory=0)
    learner.loss(batch)[0].backward()
    assert_close(learner.context.grad, golden["step1/grad_used"])


def test_start_values(shared):
    """As in the official code: the words' embeddings last, zeros in front of them."""
    backbone = golden_backbone(shared)
    learner = clipadapt.create("prograd", strength=0.8, temperature=2.0).bind(backbone, NAMES)
    assert learner.context.shape == (16, 128)
    assert not learner.context[:12].any()
    assert torch.equal(learner.context[12:].detach(), word_vectors(backbone, "a photo of a"))
    assert (learner.of.strength, learner.of.temperature) == (0.8, 2.0)
    with pytest.raises(ClipadaptError, match="4 tokens, more than n_ctx = 2"):
        clipadapt.create("prograd", n_ctx=2).bind(backbone, NAMES)
    assert clipadapt.create("prograd", n_ctx=2, init=None).bind(backbone, NAMES).context.shape == (2, 128)
