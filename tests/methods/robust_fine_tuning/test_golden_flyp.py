"""FLYP: the official loss and gradients, a step of a fit against a plain one, and the logit scale that was learned."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.data import class_texts
from clipadapt.losses.contrastive import info_nce
from clipadapt.losses.mpm_nce import mpm_nce
from clipadapt.methods import create
from clipadapt.methods.kinds.weights import Captions
from tests.golden import Golden, assert_close, golden_backbone
from tests.images import colours
from tests.tiny import tiny_clip

# Official names of the weights whose gradients are given, ours, and if ours are stored the other way round.
WEIGHTS = {
    "visual.proj": ("visual_projection.weight", True),
    "text_projection": ("text_projection.weight", True),
    "logit_scale": ("logit_scale", False),
    "visual.ln_post.weight": ("vision_model.post_layernorm.weight", False),
    "ln_final.bias": ("text_model.final_layer_norm.bias", False),
    "visual.class_embedding": ("vision_model.embeddings.class_embedding", False),
    "visual.transformer.resblocks.0.ln_1.weight": ("vision_model.encoder.layers.0.layer_norm1.weight", False),
    "transformer.resblocks.0.ln_1.weight": ("text_model.encoder.layers.0.layer_norm1.weight", False),
}


def test_loss_and_gradients(shared):
    golden, backbone = Golden(shared, "flyp"), golden_backbone(shared)
    backbone.model.requires_grad_()
    images = backbone.encode_images(golden["pixels"])
    texts = backbone.encode_tokens(golden["caption_tokens"])
    assert_close(images, golden["image_features_normalized"])
    assert_close(texts, golden["text_features_normalized"])
    images.retain_grad()
    texts.retain_grad()
    scale = backbone.model.logit_scale.exp()
    assert_close(scale, golden["logit_scale_exp"])
    loss = info_nce(images, texts, scale)
    loss.backward()
    assert_close(loss, golden["loss"])
    assert_close(images.grad, golden["grad_image_features"])
    assert_close(texts.grad, golden["grad_text_features"])
    weights = dict(backbone.model.named_parameters())
    for official, (ours, turned) in WEIGHTS.items():
        gradient = weights[ours].grad
        assert_close(gradient.T if turned else gradient, golden[f"grad/{official}"])
    assert set(golden.names("grad/")) == {f"grad/{name}" for name in WEIGHTS}


def test_loss_with_ground_labels(shared):
    golden = Golden(shared, "flyp")
    features = golden["image_features_normalized"], golden["text_features_normalized"]
    labels, scale = golden["ground_labels"], golden["logit_scale_exp"]
    assert len(labels.unique()) < len(labels)
    assert_close(mpm_nce(*features, labels, scale), golden["loss_with_ground_labels"])
    assert_close(mpm_nce(*features, torch.arange(4), scale), golden["loss"])


TEMPLATES = ["a photo of a {}.", "the {}.", "a small {}"]


@pytest.mark.parametrize("ground_labels", [False, True])
def test_a_step_is_that_of_the_plain_loss(ground_labels):
    """One batch, captions written out for each image, the transformers model itself, torch's AdamW."""
    backbone, support = load_backbone(tiny_clip()), colours(3, seed=1)
    setting = {"epochs": 1, "lr": 1e-3, "min_scale": 1.0, "templates": TEMPLATES, "ground_labels": ground_labels}
    model = create("flyp", **setting).fit(backbone, support)

    plain = load_backbone(tiny_clip())
    plain.model.requires_grad_()
    captions = Captions(plain, class_texts(support.class_names, TEMPLATES), seed=1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor(support.labels)[order]
    ids = captions.ids[captions.draw(labels, 0)]  # (12, L), with repeated rows
    assert len(ids.unique(dim=0)) < 12
    pixels = torch.stack([backbone.preprocess(support.items[row].open()) for row in order.tolist()])
    images = normalize(plain.model.get_image_features(pixels).pooler_output, dim=1)
    texts = normalize(plain.model.get_text_features(ids).pooler_output, dim=1)
    same = (labels[:, None] == labels).float() if ground_labels else torch.eye(12)
    target = same / same.sum(1, keepdim=True)
    logits = plain.model.logit_scale.exp() * images @ texts.T
    loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-3, weight_decay=0.1)
    loss.backward()
    seen = {name for name, p in plain.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}
    optimizer.step()
    for name, weight in plain.model.named_parameters():
        if name in seen:  # Adam turns a gradient of rounding errors into a whole step
            close = (model.update_[name] - weight).abs() < 1e-4
            assert close.float().mean() > 0.99, name
    assert "logit_scale" in seen
    assert model.trained_parameters == sum(p.numel() for p in plain.model.parameters())


def test_captions_are_of_their_classes_and_drawn_by_seed_and_step():
    backbone = load_backbone(tiny_clip())
    sentences = class_texts(["cat", "dog"], TEMPLATES)
    captions, labels = Captions(backbone, sentences, seed=1), torch.tensor([0, 1] * 50)
    own = [backbone.tokenize(texts) for texts in sentences]
    drawn = captions.draw(labels, 0)
    for row, label in zip(drawn.tolist(), labels.tolist(), strict=True):
        text = captions.ids[row]
        assert any(torch.equal(text[text != 0], ids[ids != 0]) for ids in own[label])
    assert len(drawn.unique()) == 6
    assert torch.equal(drawn, Captions(backbone, sentences, seed=1).draw(labels, 0))
    assert not torch.equal(drawn, captions.draw(labels, 1))
    assert not torch.equal(drawn, Captions(backbone, sentences, seed=2).draw(labels, 0))
    torch.testing.assert_close(captions.encode(labels, 0), backbone.encode_tokens(captions.ids[drawn]))


def test_the_learned_logit_scale_is_used_and_kept(tmp_path):
    backbone, support = load_backbone(tiny_clip()), colours(3, seed=1)
    model = create("flyp", epochs=5, lr=1e-2, min_scale=1.0).fit(backbone, support)
    scale = model.backbone_.logit_scale
    assert abs(scale / backbone.logit_scale - 1) > 0.01
    torch.testing.assert_close(model.weight_.norm(dim=1), torch.full((4,), scale))
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    assert loaded.backbone_.logit_scale == scale
    torch.testing.assert_close(loaded.with_classes(["cat", "dog"]).weight_.norm(dim=1), torch.full((2,), scale))
    start = create("wise-ft", method=create("flyp", epochs=2, lr=1e-2, min_scale=1.0), alpha=0).fit(backbone, support)
    assert start.backbone_.logit_scale == pytest.approx(backbone.logit_scale)
