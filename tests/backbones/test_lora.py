"""Linear layers of every family take low-rank pairs, ours and peft's: the same ones, with gradients everywhere."""

from __future__ import annotations

import peft
import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.errors import BackboneError, ClipadaptError
from clipadapt.nn.updates import LowRank
from clipadapt.training.loop import seeded


def names(backbone) -> set[str]:
    return {name for name, _ in backbone.model.named_modules()}


@pytest.mark.parametrize("kinds", [("q", "v"), ("k", "o"), ("fc1", "fc2")])
def test_low_rank_pairs_in_every_family(backbone, pixels, texts, kinds):
    targets = backbone.target_modules("both", kinds)
    assert len(targets) == 2 * 3 * len(kinds)
    plain = backbone.encode_images(pixels), backbone.encode_texts(texts)
    update = LowRank(backbone.model, targets, 2)
    with update.attached(backbone.model):
        images, sentences = backbone.encode_images(pixels), backbone.encode_texts(texts)
    torch.testing.assert_close(images, plain[0], rtol=0, atol=0)  # B is zero at the start
    torch.testing.assert_close(sentences, plain[1], rtol=0, atol=0)
    (images.sum(0)[0] + sentences.sum(0)[0]).backward()
    ups = [parameter for name, parameter in update.by_name().items() if name.endswith(".B")]
    assert len(ups) == len(targets)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in ups)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@pytest.mark.parametrize("kinds", [("q", "k", "v"), ("fc1", "fc2", "o")])
def test_peft_draws_the_same_pairs_in_every_family(backbone, pixels, texts, kinds):
    other = backbone.copy()
    targets = other.target_modules("both", kinds)
    with seeded(1):
        wrapped = peft.get_peft_model(other.model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    assert len(wrapped.targeted_module_names) == len(targets)
    with seeded(1):
        update = LowRank(backbone.model, targets, 2, scaling=1.5)
    for name, parameter in update.by_name().items():
        site, half = name.rsplit(".", 1)
        theirs = getattr(other.model.get_submodule(site), f"lora_{half}")["default"].weight
        assert torch.equal(parameter, theirs)
        with torch.no_grad():
            theirs += 0.1
            parameter += 0.1
    with update.attached(backbone.model):
        torch.testing.assert_close(backbone.encode_images(pixels), other.encode_images(pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(backbone.encode_texts(texts), other.encode_texts(texts), rtol=0, atol=1e-5)


def test_merged_pairs_are_exported_and_change_the_fingerprint(clip, pixels, tmp_path):
    other = clip.copy()
    update = LowRank(other.model, other.target_modules("vision"), 2)
    for parameter in update.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    with update.attached(other.model):
        adapted = other.encode_images(pixels).detach()
    other.model.load_state_dict(update.merged(other.model), strict=False)
    torch.testing.assert_close(other.encode_images(pixels), adapted, rtol=0, atol=1e-5)
    other.save(tmp_path / "merged")
    again = load_backbone(tmp_path / "merged")
    torch.testing.assert_close(again.encode_images(pixels), adapted, rtol=0, atol=1e-5)
    assert names(again) == names(clip)
    assert again.fingerprint == other.fingerprint != clip.fingerprint


def test_merging_in_place_is_seen(clip):
    """peft merges through `.data`, which leaves no trace in the tensor's version."""
    other = clip.copy()
    wrapped = peft.get_peft_model(other.model, peft.LoraConfig(r=2, target_modules=other.target_modules("text")))
    before = other.fingerprint
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    middle = other.fingerprint
    wrapped.merge_adapter()
    assert len({before, middle, other.fingerprint}) == 3


def test_choice_of_tower_kind_and_layer(clip):
    assert clip.target_modules("vision", ("q",), [0, -1]) == [
        "vision_model.encoder.layers.0.self_attn.q_proj",
        "vision_model.encoder.layers.2.self_attn.q_proj",
    ]
    assert all(name.startswith("text_model.") for name in clip.target_modules("text"))
    assert set(clip.target_modules("both", ("o", "fc1"))) <= names(clip)


def test_what_matches_nothing_is_refused_before_anything_changes(clip):
    """peft would accept some such names and then train nothing."""
    before = names(clip)
    with pytest.raises(ClipadaptError, match="Unknown kind of linear layer 'out_proj'"):
        clip.target_modules("both", ("out_proj",))
    with pytest.raises(ClipadaptError, match="Unknown tower 'image'"):
        clip.target_modules("image")
    with pytest.raises(BackboneError, match="Layer 12 is outside the 3 blocks of the text tower"):
        clip.target_modules("both", layers=[12])
    with pytest.raises(BackboneError, match="name no linear layer"):
        clip.target_modules("both", ())
    assert names(clip) == before
