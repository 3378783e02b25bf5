"""Checkpoints in OpenAI's and OpenCLIP's naming, in every container they come in, become an exact transformers CLIP."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from clipadapt.backbones import convert_checkpoint, load_backbone
from clipadapt.backbones.convert import read_state_dict
from clipadapt.cli.convert import convert as convert_command
from clipadapt.errors import BackboneError, ClipadaptError
from tests.tiny import tiny_clip


@pytest.fixture
def weights(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "tiny_clip.safetensors")


@pytest.fixture
def figures(golden: Path) -> dict[str, torch.Tensor]:
    with np.load(golden / "clip.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def relative(ours: torch.Tensor, golden: torch.Tensor) -> float:
    return float((ours - golden).abs().max() / golden.abs().max())


def test_golden_figures_straight_from_the_file(golden, figures):
    with pytest.warns(UserWarning, match="does not tell its activation; OpenAI's quick_gelu is assumed"):
        backbone = load_backbone(golden / "tiny_clip.safetensors")
    assert (backbone.dim, backbone.image_size, backbone.patch_size, backbone.context_length) == (32, (32, 32), 8, 77)
    images = backbone.encode_images(figures["pixels"], normalize=False)
    texts = backbone.encode_tokens(figures["tokens"], normalize=False)
    assert relative(images, figures["image_features"]) < 5e-5
    assert relative(texts, figures["text_features"]) < 5e-5
    units = backbone.encode_images(figures["pixels"]), backbone.encode_tokens(figures["tokens"])
    assert relative(backbone.logit_scale * units[0] @ units[1].T, figures["logits_per_image"]) < 5e-5
    with pytest.raises(BackboneError, match="has no tokenizer, so it encodes token ids only"):
        backbone.encode_texts(["a cat"])


def test_converted_folder_gives_the_golden_figures_in_plain_transformers(golden, figures, tmp_path):
    backbone = convert_checkpoint(golden / "tiny_clip.safetensors", tmp_path / "out", activation="quick_gelu")
    assert load_backbone(tmp_path / "out").fingerprint == backbone.fingerprint
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["hidden_act"] == config["vision_config"]["hidden_act"] == "quick_gelu"
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        output = model(pixel_values=figures["pixels"], input_ids=figures["tokens"])
    assert relative(output.logits_per_image, figures["logits_per_image"]) < 5e-5


class Tree(nn.Module):
    """A module whose parameters and buffers have the given dotted names, as in OpenAI's archives."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        heads: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            if rest:
                heads.setdefault(head, {})[rest] = tensor
            elif tensor.dtype.is_floating_point:
                self.register_parameter(head, nn.Parameter(tensor))
            else:
                self.register_buffer(head, tensor)
        for head, inner in heads.items():
            self.add_module(head, Tree(inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


OPENAI = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(512)}


def test_every_container_gives_the_same_backbone(golden, weights, tmp_path):
    expected = load_backbone(golden / "tiny_clip.safetensors", activation="gelu").fingerprint
    custom_text = {name if name.startswith(("visual.", "logit")) else f"text.{name}": t for name, t in weights.items()}
    trained = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}
    torch.save(weights, tmp_path / "plain.pt")
    torch.save(trained, tmp_path / "trained.pth")
    torch.save({**custom_text, "text.attn_mask": torch.zeros(77, 77)}, tmp_path / "custom.bin")
    torch.jit.script(Tree({**weights, **OPENAI})).save(tmp_path / "archive.pt")
    for name in ("plain.pt", "trained.pth", "custom.bin", "archive.pt"):
        assert load_backbone(tmp_path / name, activation="gelu").fingerprint == expected


def test_openai_archive_tells_its_activation_and_half_precision_becomes_float32(weights, tmp_path, recwarn):
    half = {name: tensor.half() for name, tensor in weights.items()}
    torch.jit.script(Tree({**half, **OPENAI})).save(tmp_path / "ViT.pt")
    backbone = convert_checkpoint(tmp_path / "ViT.pt", tmp_path / "out")
    assert not [warning for warning in recwarn if "activation" in str(warning.message)]
    assert backbone.model.config.vision_config.hidden_act == "quick_gelu"
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    weight = backbone.model.vision_model.embeddings.class_embedding
    assert torch.equal(weight, half["visual.class_embedding"].float())


def test_activation_matters_and_must_be_told(golden, figures, tmp_path):
    source = golden / "tiny_clip.safetensors"
    with pytest.raises(BackboneError, match="does not tell its activation; give activation='quick_gelu'"):
        convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(ClipadaptError, match="Unknown activation 'quickgelu'; did you mean 'quick_gelu'"):
        convert_checkpoint(source, tmp_path / "out", activation="quickgelu")
    assert not (tmp_path / "out").exists()
    other = load_backbone(source, activation="gelu")
    assert relative(other.encode_images(figures["pixels"], normalize=False), figures["image_features"]) > 1e-3
    assert other.fingerprint != load_backbone(source, activation="quick_gelu").fingerprint


class Evil:
    """Touches a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def test_pickled_objects_are_never_run(tmp_path):
    torch.save({"weight": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(
        BackboneError, match=r"evil\.pt holds pickled objects in addition to tensors, which are never loaded"
    ):
        load_backbone(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_clear_errors(weights, tmp_path):
    def written(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    cases = {
        "resnet": ({"visual.layer1.0.conv1.weight": torch.zeros(1)}, r"is a ResNet CLIP, .*clipadapt\[open-clip\]"),
        "other": ({"encoder.weight": torch.zeros(1)}, "is not a CLIP in .* it lacks 'visual.conv1.weight'"),
        "more": (
            {**weights, "visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(1)},
            "has weights that CLIP has no place for: 'visual",
        ),
        "less": ({k: v for k, v in weights.items() if k != "ln_final.bias"}, "lacks 1 weights .*final_layer_norm.bias"),
    }
    for name, (tensors, message) in cases.items():
        with pytest.raises(BackboneError, match=f"{name}.safetensors {message}"):
            load_backbone(written(f"{name}.safetensors", tensors), activation="gelu")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "more.safetensors").read_bytes()[:500])
    (tmp_path / "text.pt").write_text("no weights")
    for name in ("torn.safetensors", "text.pt"):
        with pytest.raises(BackboneError, match=f"{name} cannot be read as weights|{name} holds pickled"):
            load_backbone(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(BackboneError, match=r"list\.pt holds no named weights"):
        load_backbone(tmp_path / "list.pt")
    with pytest.raises(BackboneError, match="tells its activation; give none"):
        load_backbone(tiny_clip(), activation="gelu")
    with pytest.raises(BackboneError, match="There is no file"):
        read_state_dict(tmp_path / "absent.pt")


# -- vocabulary --------------------------------------------------------------------------------------------------------


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    """A merges file in the form of CLIP's, longer than 520 tokens need."""
    lines = ["#version: 0.2", "c a", "ca t</w>", "d o", "do g</w>", "o f</w>", "t h", "a b", "b c", ""]
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_tokenizer_from_a_merges_file(weights, merges, tmp_path):
    larger = {**weights, "token_embedding.weight": torch.randn(520, 128)}
    save_file(larger, tmp_path / "larger.safetensors")
    backbone = convert_checkpoint(
        tmp_path / "larger.safetensors", tmp_path / "out", activation="gelu", tokenizer=merges
    )
    ids = backbone.tokenize(["Cat of dog!"]).tolist()
    # start; cat, of, dog as merges 1, 4, 3 behind 512 bytes; "!" ends a word; end
    assert ids == [[518, 513, 516, 515, 256, 519]]
    again = load_backbone(tmp_path / "out")
    assert again.tokenize(["Cat of dog!"]).tolist() == ids
    assert again.fingerprint == backbone.fingerprint
    source = tmp_path / "larger.safetensors"
    convert_checkpoint(source, tmp_path / "two", activation="gelu", tokenizer=tmp_path / "out")
    assert load_backbone(tmp_path / "two").fingerprint == backbone.fingerprint


def test_tokenizer_must_fit_the_weights(golden, merges, tmp_path):
    with pytest.raises(BackboneError, match="is not a merges file for 512 tokens"):
        convert_checkpoint(golden / "tiny_clip.safetensors", tmp_path / "out", activation="gelu", tokenizer=merges)
    with pytest.raises(BackboneError, match="has 554 entries and end token 553, but the weights have 512 and 511"):
        convert_checkpoint(golden / "tiny_clip.safetensors", tmp_path / "out", activation="gelu", tokenizer=tiny_clip())


def test_command(golden, tmp_path):
    app = Typer()
    app.command()(convert_command)
    arguments = [str(golden / "tiny_clip.safetensors"), str(tmp_path / "out"), "--activation", "quick_gelu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (
        "images of 32 px in patches of 8, features of 32, activation quick_gelu, without a tokenizer" in result.output
    )
    assert load_backbone(tmp_path / "out").dim == 32


def test_command_starts_without_torch():
    script = "import sys, clipadapt.cli.convert; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
