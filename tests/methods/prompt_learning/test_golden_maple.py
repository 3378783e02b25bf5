"""MaPLe gives the figures of its official implementation at every depth; new classes and IVLP agree with it."""

from __future__ import annotations

import pytest
import torch

from clipadapt.methods import create
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.nn.prompts import split_words
from tests.golden import NAMES, Golden, assert_close, golden_backbone
from tests.learners import bound

VARIANTS = ["depth1_ctx2", "depth2_ctx2", "depth3_ctx3", "depth3_ctx2_words"]


def textual_names(golden: Golden) -> list[str]:
    return ["ctx", *golden.names("compound_prompts_text.")]


def coupling_names(golden: Golden) -> list[str]:
    deeper = [f"compound_prompt_projections.{i}" for i in range(len(golden.names("compound_prompts_text.")))]
    return ["proj", *deeper]


def settings_of(golden: Golden) -> dict:
    init = "a photo of a" if golden.variant.endswith("words") else None  # two of its tokens are learned
    return {"n_ctx": len(golden["ctx"]), "depth": int(golden["depth"]), "init": init}


def golden_learner(golden: Golden, backbone):
    start = {f"textual.{j}": golden[name] for j, name in enumerate(textual_names(golden))}
    for j, name in enumerate(coupling_names(golden)):
        start |= {f"couplings.{j}.{part}": golden[f"{name}.{part}"] for part in ("weight", "bias")}
    return bound("maple", backbone, NAMES, start, **settings_of(golden))


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_loss_and_gradients(shared, variant):
    golden, backbone = Golden(shared, "maple", variant), golden_backbone(shared)
    learner = golden_learner(golden, backbone)
    assert len(learner.textual) == int(golden["depth"])
    if variant.endswith("words"):  # the official prompt has the four words, of which two are learned
        rest = learner.prompts.ids[:, 3:], golden["tokenized_prompts"][:, 3 : learner.prompts.ids.shape[1]]
        assert torch.equal(*rest)
    for j, visual in enumerate(learner.visual()):
        assert_close(visual, golden[f"visual_prompt_{j}"])
    first, *deeper = learner.textual
    assert_close(learner.prompts.encode(first, deeper, normalize=False), golden["text_features"])
    with backbone.inserted(vision=learner.vision()):
        assert_close(backbone.encode_images(golden["pixels"], normalize=False), golden["image_features"])
    batch = Batch(torch.arange(4), golden["labels"], None, golden["pixels"])
    assert_close(learner.logits(learner.seen(batch), learner.texts()), golden["logits"])
    loss, hits = learner.loss(batch)
    assert_close(loss, golden["loss"])
    assert torch.equal(hits, golden["logits"].argmax(1) == golden["labels"])
    loss.backward()
    for vectors, name in zip(learner.textual, textual_names(golden), strict=True):
        assert_close(vectors.grad, golden[f"grad/{name}"])
    for coupling, name in zip(learner.couplings, coupling_names(golden), strict=True):
        assert_close(coupling.weight.grad, golden[f"grad/{name}.weight"])
        assert_close(coupling.bias.grad, golden[f"grad/{name}.bias"])


def test_the_first_words_start_the_context_and_the_others_stay(shared):
    golden, backbone = Golden(shared, "maple", "depth3_ctx2_words"), golden_backbone(shared)
    start, words = split_words(backbone, "a photo of a", 2)
    assert_close(start, golden["ctx_init"])
    assert words == "of a"
    learner = create("maple", depth=12).bind(backbone, NAMES)
    assert [tuple(v.shape) for v in learner.textual] == [(2, 128)] * 3, "as deep as the backbone"
    assert_close(learner.textual[0], golden["ctx_init"])
    ids = golden["tokenized_prompts"][:, : learner.prompts.ids.shape[1]].clone()
    ids[:, 1:3] = learner.prompts.ids[:, 1:3]  # overwritten by the context
    assert torch.equal(learner.prompts.ids, ids)
    random, none = split_words(backbone, "a photo of a", 5)
    assert random.shape == (5, 128)
    assert none == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_ivlp_with_the_projected_tokens_is_the_same_model(shared, variant):
    golden, backbone = Golden(shared, "maple", variant), golden_backbone(shared)
    coupled = golden_learner(golden, backbone)
    start = {f"textual.{j}": vectors.detach() for j, vectors in enumerate(coupled.textual)}
    start |= {f"visual.{j}": tokens.detach() for j, tokens in enumerate(coupled.visual())}
    settings = settings_of(golden)
    independent = bound("ivlp", backbone, NAMES, start, n_visual=settings["n_ctx"], **settings)
    with torch.no_grad():
        torch.testing.assert_close(independent.texts(), coupled.texts(), rtol=0, atol=1e-7)
        torch.testing.assert_close(
            independent.images(golden["pixels"]), coupled.images(golden["pixels"]), rtol=0, atol=1e-7
        )


def test_new_classes_are_those_of_the_learned_prompts(shared):
    """The tensors that are kept suffice: classes that were not learned get the features of the official prompts."""
    golden, backbone = Golden(shared, "maple", "depth3_ctx2_words"), golden_backbone(shared)
    model = create("maple", n_ctx=2)
    model.learned_ = {k: v.detach() for k, v in golden_learner(golden, backbone).named_parameters()}
    model.class_names_, model.origin_, model.dim_ = NAMES[:2], None, backbone.dim
    model._restore(backbone)
    new = model.with_classes(NAMES[2:])
    images = golden["pixels"]
    assert_close(model.image_logits(images)[0], golden["logits"][:, :2])
    assert_close(new.image_logits(images)[0], golden["logits"][:, 2:])
