"""TeCoA: its loss is that of attacked images over frozen texts; a frame is merged exactly; it makes robust."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.robustness import adversarial_accuracy
from clipadapt.features import encode_classes
from clipadapt.methods import create
from clipadapt.methods.robust_fine_tuning.tecoa import border, framed_positions, one_hot_head
from clipadapt.training.attacks import LEVEL, PixelSpace, pgd
from tests.images import colours
from tests.tiny import tiny

FAMILIES = ("clip", "metaclip_2", "siglip", "siglip2", "altclip", "chinese_clip")


def pixels_of(backbone, data):
    return torch.stack([backbone.preprocess(item.open()) for item in data.items])


def losses(backbone, support, **settings) -> list[float]:
    seen: list[float] = []
    create("tecoa", **settings).fit(backbone, support, report=lambda line: seen.append(line["loss"]))
    return seen


def test_first_loss_is_that_of_attacked_images(backbone, support):
    (first,) = losses(backbone, support, epochs=1, eps=4, attack_steps=3, step_size=2, seed=5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    plain = PixelSpace.of(backbone).plain(pixels_of(backbone, support))[order]
    labels = torch.tensor(support.labels)[order]
    texts = encode_classes(backbone, support.class_names)
    mean, std = (torch.tensor(x)[:, None, None] for x in (backbone.preprocess.mean, backbone.preprocess.std))

    def scores(x):
        return backbone.logit_scale * backbone.encode_images((x - mean) / std) @ texts.T

    start = torch.Generator().manual_seed(5 * 1_000_003)
    attacked = pgd(scores, plain, labels, eps=4 * LEVEL, step_size=2 * LEVEL, steps=3, generator=start)
    assert first == pytest.approx(cross_entropy(scores(attacked), labels).item(), abs=1e-4)
    (unattacked,) = losses(backbone, support, epochs=1, eps=0, seed=5)
    assert unattacked == pytest.approx(cross_entropy(scores(plain), labels).item(), abs=1e-4)
    assert first > unattacked + 0.05


def test_the_texts_stay_frozen_and_the_tower_learns(backbone, support):
    model = create("tecoa", lr=1e-3, epochs=3).fit(backbone, support)
    torch.testing.assert_close(model.weight_, backbone.logit_scale * encode_classes(backbone, support.class_names))
    ours, before = model.backbone_.model.state_dict(), backbone.model.state_dict()
    changed = {name for name in before if not torch.equal(ours[name], before[name])}
    assert changed
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_is_merged_exactly(family):
    backbone = load_backbone(tiny(family))
    mask = border(backbone.image_size, 5 / 32)
    assert mask.sum() == 32 * 32 - 22 * 22
    frame = torch.randn(3, *mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    merged = backbone.copy()
    merged.model.load_state_dict(framed_positions(backbone, frame), strict=False)
    pixels = pixels_of(backbone, colours(1, seed=3))
    with torch.no_grad():
        expected, plain = backbone.encode_images(pixels + frame), backbone.encode_images(pixels)
        torch.testing.assert_close(merged.encode_images(pixels), expected, atol=1e-5, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.01


@pytest.mark.parametrize("tokens", [0, 3])
def test_prompt(backbone, support, tokens, tmp_path):
    settings = {"tune": "prompt", "tokens": tokens, "frame": 4 / 32, "epochs": 15, "prompt_lr": 0.5}
    seen = losses(backbone, support, **settings)
    assert min(seen) < seen[0]
    model = create("tecoa", **settings).fit(backbone, support)
    assert model.trained_parameters == 3 * (32 * 32 - 24 * 24) + tokens * 32
    probabilities = model.predict_proba(support)
    loaded = clipadapt.load(model.save(tmp_path / "model"), backbone)
    torch.testing.assert_close(torch.tensor(loaded.predict_proba(support)), torch.tensor(probabilities))
    assert loaded.trained_parameters == model.trained_parameters
    assert model.with_classes(["cat", "dog", "star"]).predict_proba(support).shape == (12, 3)
    found = adversarial_accuracy(model, support, eps=[0, 16], steps=3)
    assert found.clean == found.attacked[0.0] == model.score(support)
    if tokens:
        with pytest.raises(ClipadaptError, match="cannot be exported"):
            model.export(tmp_path / "towers")
    else:
        model.export(tmp_path / "towers")
        exported = load_backbone(tmp_path / "towers")
        pixels = pixels_of(backbone, support)
        torch.testing.assert_close(exported.encode_images(pixels), model.encoder.encode(pixels))


def test_tokens_are_seen_even_where_no_weight_changed(backbone, support):
    """Features in the cache are those of the backbone without tokens."""
    model = create("tecoa", tune="prompt", tokens=3, epochs=1, prompt_lr=0.0).fit(backbone, support)
    with torch.no_grad():
        expected = (model.encoder.encode(pixels_of(backbone, support)) @ model.weight_.T).softmax(1)
    create("zero-shot").fit(backbone, support).predict(support)
    torch.testing.assert_close(torch.tensor(model.predict_proba(support)), expected, atol=1e-5, rtol=1e-4)
    bare = create("zero-shot").fit(backbone, support).predict_proba(support)
    assert (torch.tensor(bare) - expected).abs().max() > 1e-4


def test_one_hot_head(backbone, support):
    names = support.class_names
    head = one_hot_head(backbone, names, seed=1)
    torch.testing.assert_close(head.norm(dim=1), torch.full((4,), backbone.logit_scale))
    torch.testing.assert_close(one_hot_head(backbone, names[::-1], seed=1), head.flip(0))
    model = create("tecoa", head="one-hot", epochs=1, lr=1e-3).fit(backbone, support)
    assert model.trained_parameters == sum(t.numel() for t in model.update_.values()) + 4 * backbone.dim
    texts = normalize(model.weight_, dim=1)
    torch.testing.assert_close(texts, encode_classes(backbone, names), atol=1e-5, rtol=1e-4)


def test_more_robust_than_the_same_tuning_without_attacks(backbone):
    support, test = colours(6, seed=1), colours(8, seed=99)
    settings = {"lr": 1e-3, "epochs": 20, "batch_size": 24, "step_size": 8, "attack_steps": 3}
    plain, ours = (
        adversarial_accuracy(create("tecoa", eps=eps, **settings).fit(backbone, support), test, eps=[16], steps=6)
        for eps in (0, 16)
    )
    assert plain.clean == ours.clean == 1
    assert ours.attacked[16.0] > plain.attacked[16.0] + 0.15
