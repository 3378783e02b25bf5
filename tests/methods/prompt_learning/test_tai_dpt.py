"""TaI-DPT against a plain computation, and what the paper says of it, on drawn images of several objects."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, linear, normalize

import clipadapt
from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import MultiLabelDataset, Playground
from clipadapt.errors import ClipadaptError
from clipadapt.methods import create
from clipadapt.methods.prompt_learning.tai_dpt import Sentences, local_scores, sentences_of
from tests.images import COLOURS, colours
from tests.quick import quick
from tests.tiny import tiny, tiny_clip

NAMES = list(COLOURS)
TEXTS = ["a red cat and a blue dog", "green", "a photo of the yellow house, red and blue"]
TARGETS = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 1]]).bool()
KNOWN = ("square", "chair", "drop", "ring", "ladder", "envelope", "butterfly", "cat")  # to the embedded model


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(tiny_clip())


def small(**given):
    return create("tai-dpt", **{"n_ctx": 2, "sentences": 5, "epochs": 2, "batch_size": 8, "lr": 1e-2, **given})


def test_loss_equals_a_plain_computation(backbone):
    """Sentence by sentence, class by class, token by token, from encodings that share nothing."""
    torch.manual_seed(0)
    learner = small().bind(backbone, NAMES)
    with torch.no_grad():
        learner.contexts.mul_(20)  # away from zero, so that the two kinds differ
    loss = Sentences(backbone, TEXTS, TARGETS).loss(torch.arange(3), learner.texts(), 50.0)
    expected = torch.zeros(())
    classes = [[prompt_feature(backbone, context[0], name) for name in NAMES] for context in learner.contexts]
    for text, target in zip(TEXTS, TARGETS, strict=True):
        ids = backbone.tokenize([text])
        out = backbone.encode_tokens(ids, tokens=True)
        whole, parts = [], []
        for coarse, fine in zip(*classes, strict=True):
            whole.append(4 * coarse @ out.pooled[0])
            cosines = torch.stack([fine @ token for token in out.tokens[0]])
            weights = (50 * cosines).exp() / (50 * cosines).exp().sum()
            parts.append(4 * (weights * cosines).sum())
        for scores in (whole, parts):
            for i in range(4):
                for j in range(4):
                    if target[i] and not target[j]:
                        expected = expected + (1 - scores[i] + scores[j]).clamp(min=0) / 3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, learner.contexts)
    (wanted,) = torch.autograd.grad(expected, learner.contexts)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert all(gradient.flatten(1).norm(dim=1) > 0)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def prompt_feature(backbone: Backbone, context: torch.Tensor, name: str) -> torch.Tensor:
    """The unit feature of "[start] v_1 .. v_n NAME . [end]", through hooks of the ordinary encoding."""
    ids = backbone.tokenize([f"{'a ' * len(context)}{name}."])
    with backbone.inserted(text=[clipadapt.backbones.Insertion(context, at=1)]):
        return backbone.encode_tokens(ids)[0]


def test_the_order_of_sentences_is_kept(backbone):
    sentences = Sentences(backbone, TEXTS, TARGETS, batch_size=2)
    lengths = [len(tokens) for tokens in sentences.tokens]
    for pooled, tokens, target, length in zip(
        sentences.pooled, sentences.tokens, sentences.targets, lengths, strict=True
    ):
        row = TARGETS.tolist().index(target.tolist())
        out = backbone.encode_tokens(backbone.tokenize([TEXTS[row]]), tokens=True)
        torch.testing.assert_close(pooled, out.pooled[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens, out.tokens[0], rtol=0, atol=1e-5)
        assert length == len(backbone.tokenize([TEXTS[row]])[0])


def test_local_scores():
    rows, texts = normalize(torch.randn(2, 5, 8), dim=-1), normalize(torch.randn(3, 8), dim=-1)
    cosines = rows @ texts.T
    torch.testing.assert_close(local_scores(rows, texts, 0.0), cosines.mean(1))
    torch.testing.assert_close(local_scores(rows, texts, 1e6), cosines.amax(1))
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    torch.testing.assert_close(local_scores(rows, texts, 50.0, mask)[1], local_scores(rows[:, :3], texts, 50.0)[1])


def test_image_scores_equal_a_plain_computation(backbone):
    """Patches by the value path of the last block, written out with its weights."""
    model = small().fit(backbone, class_names=NAMES)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows: list[torch.Tensor] = []
    with backbone.after_blocks("vision", {-2: rows.append}):
        whole = backbone.encode_images(pixels)
    block = backbone.blocks("vision")[-1]
    hidden = rows[0][:, 1:]  # without the class token
    normed = layer_norm(hidden, hidden.shape[-1:], block.layer_norm1.weight, block.layer_norm1.bias, 1e-5)
    value = linear(normed, block.self_attn.v_proj.weight, block.self_attn.v_proj.bias)
    hidden = hidden + linear(value, block.self_attn.out_proj.weight, block.self_attn.out_proj.bias)
    hidden = hidden + block.mlp(block.layer_norm2(hidden))
    patches = normalize(backbone.project_rows(backbone.model.vision_model.post_layernorm(hidden)), dim=-1)
    learner = model._bound
    coarse, fine = (
        torch.stack([prompt_feature(backbone, context[0], name) for name in NAMES]) for context in learner.contexts
    )
    cosines = patches @ fine.T
    local = ((40 * cosines).softmax(1) * cosines).sum(1)
    expected = backbone.logit_scale * (whole @ coarse.T + local) / 2
    torch.testing.assert_close(model.image_logits(pixels)[0], expected, rtol=1e-4, atol=1e-4)
    model.local_share = 0.0
    torch.testing.assert_close(model.image_logits(pixels)[0], backbone.logit_scale * whole @ coarse.T)


def test_captions_and_synonyms_decide_what_is_learned(backbone, tmp_path):
    (tmp_path / "c.txt").write_text("a red and blue house\nnothing of it\nleaves by the sea\n", encoding="utf-8")
    method = small(captions=tmp_path / "c.txt", synonyms={"green": ["leaf"], "blue": ["sea"]}, templates="the {}")
    texts, targets = sentences_of(method, NAMES)
    named = [{NAMES[c] for c in row.nonzero()[:, 0].tolist()} for row in targets]
    assert dict(zip(texts, named, strict=True)) == {
        **{f"the {name}": {name} for name in NAMES},
        "a red and blue house": {"red", "blue"},
        "leaves by the sea": {"green", "blue"},
    }
    model = method.fit(backbone, class_names=NAMES)
    (tmp_path / "c.txt").unlink()  # a saved model does not need its captions
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    images = colours(1, seed=1)
    torch.testing.assert_close(loaded.image_logits(images)[0], model.image_logits(images)[0])
    with pytest.raises(ClipadaptError, match="tai-dpt: none of the captions names a class"):
        small(captions=["nothing of it"]).fit(backbone, class_names=NAMES)


def test_images_set_the_threshold_and_nothing_else(backbone):
    images = colours(2, seed=1)
    support = MultiLabelDataset(images.items, [frozenset({label}) for label in images.labels], NAMES)
    with_images, without = small().fit(backbone, support), small().fit(backbone, MultiLabelDataset([], [], NAMES))
    assert torch.equal(with_images.image_logits(images)[0], without.image_logits(images)[0])
    assert with_images.predict(images).shape == (8, 4)
    assert without.score(support) == with_images.score(support)
    for use in (without.predict, without.predict_proba):
        with pytest.raises(ClipadaptError, match="no image to choose a threshold on"):
            use(images)
    without.threshold_ = with_images.threshold_
    assert (without.predict(images) == with_images.predict(images)).all()


def test_features_alone_are_refused(backbone):
    with pytest.raises(ClipadaptError, match="use image_logits or predict"):
        small().fit(backbone, class_names=NAMES).logits(torch.randn(2, backbone.dim))


@pytest.mark.parametrize("family", ["siglip", "siglip2", "altclip", "chinese_clip", "metaclip_2"])
def test_other_families(family):
    backbone, losses = load_backbone(tiny(family)), []
    model = small(epochs=8).fit(backbone, class_names=NAMES, report=lambda step: losses.append(step["loss"]))
    assert sum(losses[-3:]) < sum(losses[:3])
    assert model.predict_proba(colours(1, seed=1)).shape == (4, 4)


@pytest.mark.claim(
    "tai-dpt", "no picture seen, mAP of drawings of one to three things: above zero-shot and global prompts"
)
def test_beats_zero_shot_and_global_prompts_without_an_image(claim):
    """The paper's two claims, on drawn images of one to three objects, over three seeds."""
    backbone = load_backbone()
    test, none = Playground(kinds=KNOWN, seed=7).multilabel(200), MultiLabelDataset([], [], list(KNOWN))
    zero_shot = create("zero-shot").fit(backbone, none).score(test)
    double, whole = [], []
    for seed in (1, 2, 3):
        model = quick("tai-dpt", seed=seed).fit(backbone, none)
        double.append(model.score(test))
        model.local_share = 0.0
        whole.append(model.score(test))
    claim({"tai-dpt": double, "global only": whole, "zero-shot": [zero_shot] * 3})
    assert min(double) > zero_shot + 0.03
    assert sum(double) > sum(whole)
