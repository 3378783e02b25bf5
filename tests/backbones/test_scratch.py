import json
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPTokenizer

from clipadapt.backbones import load_backbone
from clipadapt.backbones.scratch import PRESETS, save_clip, scratch_clip
from clipadapt.errors import BackboneError, ClipadaptError


def letters_tokenizer(*first: str) -> CLIPTokenizer:
    words = [*first, *(chr(code) for code in range(ord("a"), ord("z") + 1)), "a</w>", "b</w>"]
    words += [word for word in ("<|startoftext|>", "<|endoftext|>") if word not in words]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


def test_sizes_come_from_preset_overrides_and_tokenizer():
    tokenizer = letters_tokenizer()
    model = scratch_clip(tokenizer, "tiny", vision_layers=3, image_size=24)
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.num_hidden_layers, vision.image_size, vision.hidden_size) == (3, 24, PRESETS["tiny"]["vision_width"])
    assert (text.vocab_size, text.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-3)


def test_weights_are_a_function_of_the_seed_alone():
    tokenizer = letters_tokenizer()
    before = torch.get_rng_state()
    one, again, other = (scratch_clip(tokenizer, "tiny", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert {name for name in one if one[name].ndim > 1 and torch.equal(one[name], other[name])} == set()


def test_a_fresh_tower_keeps_its_signal_in_range():
    model = scratch_clip(letters_tokenizer(), "small", seed=0)
    pixels = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    states = model.vision_model(pixels, output_hidden_states=True).hidden_states
    assert all(0.3 < state.std().item() < 3 for state in states[1:])


def test_folder_is_a_plain_transformers_model_and_a_backbone(tmp_path):
    tokenizer = letters_tokenizer()
    model = scratch_clip(tokenizer, "tiny").eval()
    save_clip(scratch_clip(tokenizer, "tiny", seed=9), tokenizer, tmp_path / "model")
    folder = save_clip(model, tokenizer, tmp_path / "model")  # a second time: the files are replaced
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    loaded = CLIPModel.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == tokenizer("ab")["input_ids"]

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 33, 3), np.uint8))
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    backbone = load_backbone(folder)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        features = backbone.encode_images(backbone.preprocess(picture)[None])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_on_disk_loads_as_single(tmp_path):
    tokenizer = letters_tokenizer()
    model = scratch_clip(tokenizer, "tiny")
    whole = save_clip(model, tokenizer, tmp_path / "whole") / "model.safetensors"
    half = save_clip(model, tokenizer, tmp_path / "half", dtype=torch.float16) / "model.safetensors"
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    assert half.stat().st_mode & stat.S_IRGRP  # a model is there to be read by others, too
    loaded = CLIPModel.from_pretrained(half.parent)
    assert loaded.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-6)
    assert json.loads((half.parent / "config.json").read_text())["dtype"] == "float32"


def test_refusals_name_what_is_wrong():
    tokenizer = letters_tokenizer()
    with pytest.raises(ClipadaptError, match="Unknown preset 'smal'; did you mean 'small'"):
        scratch_clip(tokenizer, "smal")
    with pytest.raises(ClipadaptError, match="'vision_width'"):
        scratch_clip(tokenizer, "tiny", vision_widht=8)
    with pytest.raises(BackboneError, match="end token has id 2"):
        scratch_clip(letters_tokenizer("x", "<|startoftext|>", "<|endoftext|>"), "tiny")
