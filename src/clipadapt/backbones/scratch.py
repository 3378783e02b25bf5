"""A fresh, randomly initialised two-tower CLIP in `transformers`' own class, and the plain folder it is kept in."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerBase

from clipadapt.backbones.backbone import Backbone
from clipadapt.backbones.families import Pretrained
from clipadapt.backbones.loading import load_backbone
from clipadapt.errors import BackboneError, unknown_name

PRESETS: Mapping[str, Mapping[str, int]] = {
    # about 5 M parameters with a vocabulary of 8 k: the model that ships inside the package
    "small": {
        "image_size": 48, "patch_size": 8, "vision_width": 192, "vision_layers": 6, "vision_heads": 3,
        "text_width": 192, "text_layers": 4, "text_heads": 3, "context_length": 32, "projection_dim": 192,
    },
    # seconds to train: for trying a recipe, and for tests
    "tiny": {
        "image_size": 16, "patch_size": 4, "vision_width": 32, "vision_layers": 2, "vision_heads": 2,
        "text_width": 32, "text_layers": 2, "text_heads": 2, "context_length": 16, "projection_dim": 32,
    },
}  # fmt: skip


def scratch_clip(
    tokenizer: PreTrainedTokenizerBase, preset: str = "small", *, seed: int = 0, **sizes: int
) -> CLIPModel:
    """A random CLIP for `tokenizer`'s vocabulary, in float32 on the CPU; the same seed gives the same weights.

    preset: a name in PRESETS. sizes: overrides of single sizes of the preset (the keys of PRESETS["small"]).
    Raises ClipadaptError for an unknown preset or size, BackboneError for a tokenizer that CLIP cannot use.
    """
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    for name in sizes:
        if name not in PRESETS[preset]:
            raise unknown_name("size of a two-tower model", name, PRESETS[preset])
    size = {**PRESETS[preset], **sizes}
    if tokenizer.eos_token_id is None or tokenizer.bos_token_id is None:
        raise BackboneError("The tokenizer lacks a start or an end token; CLIP's text tower needs both.")
    if tokenizer.eos_token_id == 2:
        raise BackboneError("The tokenizer's end token has id 2, which CLIP in transformers reads otherwise.")
    config = CLIPConfig(**tower_configs(tokenizer, size))
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        model = CLIPModel(config)
    _initialise(model, torch.Generator().manual_seed(seed))
    return model


def tower_configs(tokenizer: Any, size: Mapping[str, int]) -> dict[str, Any]:
    """CLIP's configuration, as keywords, of two towers of these sizes (the keys of PRESETS["small"])."""
    return {
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": size["text_width"],
            "intermediate_size": 4 * size["text_width"],
            "num_hidden_layers": size["text_layers"],
            "num_attention_heads": size["text_heads"],
            "max_position_embeddings": size["context_length"],
            "hidden_act": "gelu",
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "vision_config": {
            "hidden_size": size["vision_width"],
            "intermediate_size": 4 * size["vision_width"],
            "num_hidden_layers": size["vision_layers"],
            "num_attention_heads": size["vision_heads"],
            "image_size": size["image_size"],
            "patch_size": size["patch_size"],
            "hidden_act": "gelu",
        },
        "projection_dim": size["projection_dim"],
    }


def new_backbone(
    preset: str = "small", *, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0, **sizes: int
) -> Backbone:
    """A backbone with random weights, to be trained.

    Args:
        preset: a name in PRESETS.
        tokenizer: whose vocabulary the text tower gets; by default the embedded model's.
        seed: of the weights; the same one gives the same weights.
        sizes: overrides of single sizes of the preset (the keys of PRESETS["small"]).

    Raises:
        ClipadaptError: an unknown preset or size.
        BackboneError: a tokenizer that CLIP cannot use.

    >>> new_backbone("tiny").dim
    32
    """
    if tokenizer is None:
        tokenizer = load_backbone().tokenizer
    model = scratch_clip(tokenizer, preset, seed=seed, **sizes)
    return Backbone(f"new:{preset}", Pretrained("clip", model, _processor(model), tokenizer))


def _processor(model: CLIPModel) -> CLIPImageProcessorPil:
    side: int = model.config.vision_config.image_size  # type: ignore
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@torch.no_grad()
def _initialise(model: CLIPModel, generator: torch.Generator) -> None:
    """OpenAI's initialisation of CLIP (its released code); biases zero and norms one as constructed."""

    def normal(weight: Tensor, std: float) -> None:
        weight.normal_(0, std, generator=generator)

    for tower in (model.vision_model, model.text_model):
        width, layers = tower.config.hidden_size, tower.encoder.layers
        residual = (2 * len(layers)) ** -0.5  # keeps the variance of the residual stream at one
        for layer in layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                normal(projection.weight, width**-0.5)
            normal(layer.self_attn.out_proj.weight, width**-0.5 * residual)
            normal(layer.mlp.fc1.weight, (2 * width) ** -0.5)
            normal(layer.mlp.fc2.weight, width**-0.5 * residual)
    vision, text = model.vision_model.embeddings, model.text_model.embeddings
    width = vision.embed_dim
    normal(vision.class_embedding, width**-0.5)
    normal(vision.position_embedding.weight, width**-0.5)
    normal(vision.patch_embedding.weight, (3 * vision.patch_embedding.weight[0].numel()) ** -0.5)
    normal(text.token_embedding.weight, 0.02)
    normal(text.position_embedding.weight, 0.01)
    for head in (model.visual_projection, model.text_projection):
        normal(head.weight, head.in_features**-0.5)


def save_clip(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    processor: Any = None,
) -> Path:
    """Write a plain `transformers` folder: configuration, weights stored as `dtype`, tokenizer and image preprocessing.

    The configuration keeps saying float32: weights stored in half still load, and compute, in single precision.
    Without a `processor`, CLIP's for the model's size is written. Every file is renamed into place when it is whole, so
    that a reader never meets half a file. Returns the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], "float32"
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as aside:
        Path(aside, "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
        for part in (config, tokenizer, processor or _processor(model)):
            part.save_pretrained(aside)
        for file in sorted(Path(aside).iterdir()):
            os.replace(file, folder / file.name)
    return folder
