"""The model families, told apart by one table of attribute names; the only file that imports `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AttentionInterface

from ..errors import BackboneError

TowerName = Literal["text", "vision"]


@dataclass(frozen=True)
class Tower:
    """Where the parts of one tower are, as dotted names: from the model, or (attention, linears) from a block."""

    embeddings: str
    blocks: str
    norm: str  # after the last block
    tokens: str = ""  # the table of token vectors (text towers)
    attention: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.out_proj"
    fc1: str = "mlp.fc1"
    fc2: str = "mlp.fc2"


VIT = Tower("vision_model.embeddings", "vision_model.encoder.layers", "vision_model.post_layernorm")
GPT = Tower(
    "text_model.embeddings",
    "text_model.encoder.layers",
    "text_model.final_layer_norm",
    tokens="text_model.embeddings.token_embedding",
)
_BERT_BLOCK = {
    "attention": "attention.self",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
ROBERTA = Tower(
    "text_model.roberta.embeddings",
    "text_model.roberta.encoder.layers",
    "text_model.pre_LN",
    tokens="text_model.roberta.embeddings.word_embeddings",
    **_BERT_BLOCK,
)
BERT = Tower(
    "text_model.embeddings",
    "text_model.encoder.layer",
    "",
    tokens="text_model.embeddings.word_embeddings",
    **_BERT_BLOCK,
)


@dataclass(frozen=True)
class Family:
    """What differs from one family to another.

    padding  "causal": nothing behind the end token matters, so texts are cut to their true length;
             "masked": texts are cut to the longest of the batch and padding is masked out;
             "fixed": padding is attended to, so texts are filled up to the context length as in training.
    """

    model: str  # class name in transformers
    text: Tower
    padding: Literal["causal", "masked", "fixed"]
    vision: Tower = VIT
    class_token: bool = True  # row 0 of the vision tower; without it a pooling head makes the image feature
    patchified: bool = False  # the vision tower takes flattened patches and their grid instead of pixels
    position_offset: int = 0  # rows of the position table that texts cannot use


FAMILIES: dict[str, Family] = {  # by `model_type` of config.json
    "clip": Family("CLIPModel", GPT, "causal"),
    "metaclip_2": Family("MetaClip2Model", GPT, "causal"),
    "siglip": Family("SiglipModel", GPT, "fixed", class_token=False),
    "siglip2": Family("Siglip2Model", GPT, "fixed", class_token=False, patchified=True),
    "altclip": Family("AltCLIPModel", ROBERTA, "masked", position_offset=2),
    "chinese_clip": Family("ChineseCLIPModel", BERT, "masked"),
}

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Pretrained:
    """What one source holds: the model, its image processor and, where it has one, its tokenizer."""

    family: str
    model: Any
    processor: Any
    tokenizer: Any


def from_pretrained(source: str) -> Pretrained:
    """Load a transformers folder or hub id as float32; every failure is one BackboneError that names `source`."""
    folder = Path(source) if Path(source).is_dir() else None
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        if config.model_type not in FAMILIES:
            raise BackboneError(
                f"{source} holds a model of type {config.model_type!r}; known are: {', '.join(sorted(FAMILIES))}."
            )
        model, report = getattr(transformers, FAMILIES[config.model_type].model).from_pretrained(
            source, config=config, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
        absent = sorted([*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])])
        if absent:  # transformers would fill them at random and go on
            raise BackboneError(f"{source} lacks {len(absent)} weights of its model, the first is {absent[0]!r}.")
        processor = _image_processor(source)
        has_tokenizer = folder is None or any(any(folder.glob(name)) for name in _TOKENIZER_FILES)
        # without its files transformers would make an empty tokenizer and go on
        tokenizer = transformers.AutoTokenizer.from_pretrained(source) if has_tokenizer else None
    except (OSError, ValueError, RuntimeError) as error:
        what = "The folder" if folder else "It is no folder here, and as a hub id"
        raise BackboneError(f"Cannot load {source!r} as a backbone. {what} gives: {_first_line(error)}") from error
    return Pretrained(config.model_type, model, processor, tokenizer)


def _image_processor(source: str) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(source, backend="pil")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def register_attention(name: str, function: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    """Make `function` usable as `config._attn_implementation = name` of any attention module."""
    AttentionInterface.register(name, function)


def submodule(root: nn.Module, name: str) -> nn.Module:
    return root.get_submodule(name) if name else nn.Identity()
