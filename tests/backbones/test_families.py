"""Every family gives what transformers gives, and keeps doing so through files, sizes and paddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.errors import BackboneError
from tests.tiny import tiny


def reference_images(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Unit image features (B, D) by transformers alone."""
    model = transformers.AutoModel.from_pretrained(folder)
    inputs = {"pixel_values": pixels}
    if model.config.model_type == "siglip2":  # takes flattened patches
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 3, h, w, 8, 8)
        grid = patches.shape[2:4]
        inputs = {
            "pixel_values": patches.permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2),
            "pixel_attention_mask": torch.ones(len(pixels), grid[0] * grid[1], dtype=torch.int64),
            "spatial_shapes": torch.tensor([list(grid)] * len(pixels)),
        }
    with torch.no_grad():
        return torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)


def reference_texts(folder: Path, texts: list[str]) -> torch.Tensor:
    """Unit text features (T, D) by transformers alone, each text padded as its family was trained."""
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding="max_length", padding_side="right", max_length=16, return_tensors="pt")
    if model.config.model_type.startswith("siglip"):  # padding is attended to
        inputs = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        return torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)


def test_equals_transformers_before_and_after_save(backbone, pixels, texts, tmp_path):
    images, sentences = reference_images(tiny(backbone.family), pixels), reference_texts(tiny(backbone.family), texts)
    backbone.save(tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    for one in (backbone, again):
        torch.testing.assert_close(one.encode_images(pixels), images, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.encode_texts(texts), sentences, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference_images(tmp_path / "saved", pixels), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference_texts(tmp_path / "saved", texts), sentences, rtol=0, atol=1e-5)
    assert again.fingerprint == backbone.fingerprint
    assert (again.dim, again.image_size, again.family) == (images.shape[1], (32, 32), backbone.family)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]  # nothing half-written lies about


def test_logit_scale_and_bias(backbone):
    assert backbone.logit_scale == pytest.approx(torch.tensor(3.0).exp().item())
    assert backbone.logit_bias == (-5.0 if backbone.family.startswith("siglip") else 0.0)


def test_loaded_frozen_and_in_evaluation_mode(backbone):
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_unnormalised_features_are_the_same_directions(backbone, pixels, texts):
    raw = backbone.encode_images(pixels, normalize=False)
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=-1), backbone.encode_images(pixels))
    raw = backbone.encode_texts(texts, normalize=False)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=-1), backbone.encode_texts(texts))


# -- texts -----------------------------------------------------------------------------------------------------------


def test_text_does_not_depend_on_its_neighbours(backbone, texts):
    together = backbone.encode_texts(texts)
    alone = torch.cat([backbone.encode_texts([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_tokens_are_padded_with_zeros_and_any_padding_is_understood(backbone, texts):
    ids = backbone.tokenize(texts)
    assert ids.dtype == torch.int64
    lengths = [len(backbone.tokenize([text])[0]) for text in texts]
    assert ids.shape == (len(texts), max(lengths))
    assert all((row[length:] == 0).all() for row, length in zip(ids, lengths, strict=True))
    features = backbone.encode_texts(texts)
    longer = torch.nn.functional.pad(ids, (0, 16 - ids.shape[1]))
    torch.testing.assert_close(backbone.encode_tokens(longer), features, rtol=0, atol=1e-5)
    pad = backbone.tokenizer.pad_token_id
    native = torch.tensor([[*row[:n].tolist(), *[pad] * (16 - n)] for row, n in zip(ids, lengths, strict=True)])
    torch.testing.assert_close(backbone.encode_tokens(native), features, rtol=0, atol=1e-5)


def test_causal_texts_run_at_their_true_length_and_fixed_ones_at_full(backbone, texts):
    seen = []
    hook = backbone.blocks("text")[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    backbone.encode_tokens(torch.nn.functional.pad(backbone.tokenize(texts[:1]), (0, 5)))
    hook.remove()
    true_length = backbone.tokenize(texts[:1]).shape[1]
    assert seen == [16 if backbone.family.startswith("siglip") else true_length]


def test_too_long_a_text_is_cut_and_keeps_its_end(backbone):
    ids = backbone.tokenize(["a photo of the red house " * 5])
    assert ids.shape == (1, 16)
    assert ids[0, -1] == backbone.tokenizer.eos_token_id or backbone.family == "chinese_clip"
    assert backbone.encode_tokens(ids).isfinite().all()


def test_tokens_of_a_text_lie_in_the_joint_space(backbone, texts):
    """What the pooled row goes through, every row goes through; the row that is pooled gives the pooled feature."""
    ids = torch.nn.functional.pad(backbone.tokenize(texts), (0, 2))
    same_end = backbone.family == "siglip"  # whose end token is its padding
    lengths = [len(backbone.tokenize([text])[0]) - same_end for text in texts]
    out = backbone.encode_tokens(ids, tokens=True, normalize=False)
    torch.testing.assert_close(out.pooled, backbone.encode_tokens(ids, normalize=False))
    assert out.tokens.shape == (len(texts), max(lengths), backbone.dim)
    assert out.mask.tolist() == [[j < length for j in range(max(lengths))] for length in lengths]
    if backbone.family.startswith("siglip"):  # pools the last of all rows, which only the longest of texts fills
        full = backbone.encode_tokens(torch.tensor([[9] * 16]), tokens=True)
        torch.testing.assert_close(full.tokens[:, 15], full.pooled)
    else:
        pooled = [length - 1 if "causal-text" in backbone.capabilities else 0 for length in lengths]
        torch.testing.assert_close(out.tokens[range(len(texts)), pooled], out.pooled)
    unit = backbone.encode_tokens(ids, tokens=True)
    torch.testing.assert_close(unit.tokens, torch.nn.functional.normalize(out.tokens, dim=-1))
    for row, length in enumerate(lengths):
        alone = backbone.encode_tokens(ids[row : row + 1], tokens=True)
        torch.testing.assert_close(alone.tokens[0], unit.tokens[row, :length], rtol=0, atol=1e-5)


def test_no_texts_no_features(backbone):
    assert backbone.encode_texts([]).shape == (0, backbone.dim)
    none = backbone.encode_tokens(torch.zeros(0, 0, dtype=torch.int64), tokens=True)
    assert (none.pooled.shape, none.tokens.shape, none.mask.shape) == ((0, backbone.dim), (0, 1, backbone.dim), (0, 1))


def test_text_errors(clip):
    with pytest.raises(BackboneError, match="no end token"):
        clip.encode_tokens(torch.tensor([[5, 6, 7]]))
    with pytest.raises(BackboneError, match="int64"):
        clip.encode_tokens(torch.zeros(2, 3))
    with pytest.raises(BackboneError, match="list of strings"):
        clip.encode_texts("a cat")
    end = clip.tokenizer.eos_token_id
    with pytest.raises(BackboneError, match="17 tokens exceeds the context length, which is 16"):
        clip.encode_tokens(torch.tensor([[1] * 16 + [end]]))


def test_old_clip_configurations_pool_at_the_largest_id(tmp_path, texts):
    """Before transformers fixed the tokenizer, CLIP's config said that the end token is 2."""
    folder = shutil.copytree(tiny("clip"), tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    old = load_backbone(folder)
    torch.testing.assert_close(old.encode_texts(texts), reference_texts(tiny("clip"), texts), rtol=0, atol=1e-5)


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (24, 16), (45, 33)])
def test_other_sizes_by_position_interpolation(backbone, size):
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    out = backbone.encode_images(pixels, tokens=True)
    assert out.grid == (size[0] // 8, size[1] // 8)
    assert out.patches.shape == (2, out.grid[0] * out.grid[1], backbone.dim)
    if backbone.family != "siglip2":
        model = transformers.AutoModel.from_pretrained(tiny(backbone.family))
        with torch.no_grad():
            expected = model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(backbone.encode_images(pixels, normalize=False), expected, rtol=0, atol=1e-5)


def test_patches_lie_in_the_joint_space(backbone, pixels):
    """With a class token: norm and projection of each row; with a pooling head: each patch as the whole picture."""
    out = backbone.encode_images(pixels, tokens=True, normalize=False)
    torch.testing.assert_close(out.pooled, backbone.encode_images(pixels, normalize=False))
    assert out.inserted.shape == (3, 0, 32)
    model = backbone.model
    if backbone.family.startswith("siglip"):
        inputs = pixels
        one = torch.stack([model.vision_model.head(row[:, None]) for row in _last_rows(backbone, inputs).unbind(1)], 1)
        torch.testing.assert_close(out.patches, one, rtol=0, atol=1e-5)
    else:
        rows = model.get_image_features(pixels).last_hidden_state
        expected = model.visual_projection(model.vision_model.post_layernorm(rows))
        torch.testing.assert_close(out.patches, expected[:, 1:])
        torch.testing.assert_close(out.pooled, expected[:, 0])


def _last_rows(backbone: Backbone, pixels: torch.Tensor) -> torch.Tensor:
    """(B, N, W) after the last norm."""
    caught = []
    hook = backbone.model.vision_model.post_layernorm.register_forward_hook(lambda m, a, out: caught.append(out))
    backbone.encode_images(pixels)
    hook.remove()
    return caught[0]


def test_no_pictures_no_features(backbone):
    assert backbone.encode_images(torch.zeros(0, 3, 32, 32)).shape == (0, backbone.dim)
    assert backbone.encode_images(torch.zeros(0, 3, 32, 32), tokens=True).patches.shape == (0, 16, backbone.dim)


def test_picture_errors(clip):
    with pytest.raises(BackboneError, match=r"\(B, 3, H, W\)"):
        clip.encode_images(torch.zeros(3, 32, 32))
    with pytest.raises(BackboneError, match="smaller than one patch of 8"):
        clip.encode_images(torch.zeros(1, 3, 7, 32))


def test_gradients_reach_the_pixels(backbone, pixels):
    pixels = pixels.requires_grad_()
    backbone.encode_images(pixels).sum(0)[0].backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


# -- identity --------------------------------------------------------------------------------------------------------


def test_fingerprint_sees_one_changed_weight_however_it_was_written(backbone):
    other = backbone.copy()
    assert other.fingerprint == backbone.fingerprint
    with torch.no_grad():
        other.model.vision_model.post_layernorm.bias[0] += 1e-3
    changed = other.fingerprint
    assert changed != backbone.fingerprint
    other.model.vision_model.post_layernorm.bias.data[0] += 1.0  # leaves no trace in the tensor's version
    assert other.fingerprint not in (changed, backbone.fingerprint)


def test_fingerprint_sees_preprocessing_and_tokenizer(tmp_path):
    plain = load_backbone(tiny("clip"))
    folder = shutil.copytree(tiny("clip"), tmp_path / "other")
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "resample": 2}))
    assert load_backbone(folder).fingerprint != plain.fingerprint
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert load_backbone(folder).fingerprint == plain.fingerprint
    (folder / "tokenizer.json").unlink()
    assert load_backbone(folder).fingerprint != plain.fingerprint


def test_source_of_a_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    shutil.copytree(tiny("clip"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    source = load_backbone("model").source
    monkeypatch.chdir("/")
    assert load_backbone(source).source == source == str(tmp_path / "model")


def test_copy_is_independent(clip, pixels):
    other = clip.copy()
    with torch.no_grad():
        other.model.visual_projection.weight.mul_(-1)
    torch.testing.assert_close(other.encode_images(pixels), -clip.encode_images(pixels))


def test_saving_replaces_an_older_backbone_and_nothing_else(clip, tmp_path):
    clip.save(tmp_path / "out")
    other = clip.copy()
    with torch.no_grad():
        other.model.logit_scale += 1
    other.save(tmp_path / "out")
    assert load_backbone(tmp_path / "out").fingerprint == other.fingerprint
    (tmp_path / "out" / "holiday.jpg").touch()
    (tmp_path / "notes").touch()
    with pytest.raises(BackboneError, match=r"out is not replaced, since it holds holiday\.jpg"):
        clip.save(tmp_path / "out")
    with pytest.raises(BackboneError, match="notes is not replaced"):
        clip.save(tmp_path / "notes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "out"]
    assert load_backbone(tmp_path / "out").fingerprint == other.fingerprint


# -- loading ---------------------------------------------------------------------------------------------------------


def test_half_precision_is_loaded_as_float32(tmp_path, pixels):
    folder = shutil.copytree(tiny("clip"), tmp_path / "half")
    half = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    backbone = load_backbone(folder)
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    backbone.save(tmp_path / "single")
    assert load_backbone(tmp_path / "single").fingerprint == backbone.fingerprint
    assert backbone.encode_images(pixels).dtype == torch.float32


def test_missing_weights_are_refused_not_made_up(tmp_path):
    folder = shutil.copytree(tiny("clip"), tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"holes lacks 1 weights of its model .* 'visual_projection"):
        load_backbone(folder)


def test_without_tokenizer_files_only_ids_are_encoded(tmp_path, texts):
    full = load_backbone(tiny("clip"))
    folder = shutil.copytree(tiny("clip"), tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    backbone = load_backbone(folder)
    ids = full.tokenize(texts)
    torch.testing.assert_close(backbone.encode_tokens(ids), full.encode_tokens(ids))
    assert full.capabilities - backbone.capabilities == {"texts"}
    with pytest.raises(BackboneError, match="has no tokenizer"):
        backbone.encode_texts(texts)


def test_a_tokenizer_that_cannot_be_made_is_an_error_not_a_substitute(tmp_path):
    """SigLIP's own needs the package sentencepiece and its model; another class would keep case and punctuation."""
    folder = shutil.copytree(tiny("siglip"), tmp_path / "siglip")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "SiglipTokenizer"}))
    with pytest.raises(BackboneError, match="siglip has no tokenizer that can be read: "):
        load_backbone(folder)


def test_clear_errors_for_sources_that_are_none(tmp_path):
    for nowhere in (tmp_path / "nowhere", "models/my/clip"):
        with pytest.raises(BackboneError, match="There is no backbone at"):
            load_backbone(nowhere)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="empty is not a complete backbone"):
        load_backbone(tmp_path / "empty")
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BackboneError, match=r"type 'bert'; known are: altclip, chinese_clip, clip"):
        load_backbone(other)
    torn = shutil.copytree(tiny("clip"), tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(BackboneError, match="torn is not a complete backbone"):
        load_backbone(torn)
    (torn / "config.json").write_text("{")
    with pytest.raises(BackboneError, match="torn is not a complete backbone"):
        load_backbone(torn)


def test_capabilities(backbone):
    assert {"texts", "patches", "prompts", "attention", "gradients", "weights"} <= backbone.capabilities
    assert ("causal-text" in backbone.capabilities) == (backbone.family in ("clip", "clip_trunk", "metaclip_2"))
