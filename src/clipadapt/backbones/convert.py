"""Weights in OpenAI's or OpenCLIP's ViT naming as a transformers CLIP; the shapes tell the architecture."""

from __future__ import annotations

import gzip
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clipadapt.backbones.backbone import Backbone
from clipadapt.backbones.families import (
    Pretrained,
    clip_model,
    clip_tokenizer,
    first_line,
    image_processor,
    load_tokenizer,
)
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.errors import BackboneError, unknown_name

ACTIVATIONS = ("quick_gelu", "gelu")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # vision towers H, g, bigG, e of OpenCLIP
_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask"}
_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTER_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def convert_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    activation: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Backbone:
    """Turn a checkpoint into a plain transformers folder at `out`, and return the backbone.

    source      .safetensors, or .pt/.pth/.bin holding a state dict or a TorchScript archive
    activation  "quick_gelu" (OpenAI) or "gelu" (most of LAION and DataComp): the weights do not tell, so it must be
                given unless the file is OpenAI's own
    tokenizer   folder or hub id of a tokenizer, or CLIP's merges file (bpe_simple_vocab_16e6.txt.gz); without one the
                result encodes token ids only

    Raises BackboneError naming the file and what is wrong with it.
    """
    state = read_state_dict(Path(source))
    if activation is None and not _is_openai(state):
        raise BackboneError(
            f"{source} does not tell its activation; give activation='quick_gelu' (OpenAI, names with 'quickgelu') "
            "or 'gelu' (other OpenCLIP models)."
        )
    backbone = Backbone(str(out), from_state_dict(state, str(source), activation or "quick_gelu", tokenizer))
    backbone.save(out)
    return backbone


def load_checkpoint(source: Path, activation: str | None, device: str | torch.device) -> Backbone:
    """A backbone straight from a file of weights; it has no tokenizer."""
    state = read_state_dict(source)
    if activation is None and not _is_openai(state):
        warnings.warn(
            f"{source} does not tell its activation; OpenAI's quick_gelu is assumed (activation='gelu' fits most "
            "OpenCLIP models).",
            stacklevel=3,
        )
    return Backbone(str(source), from_state_dict(state, str(source), activation or "quick_gelu"), device)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Names and tensors of a file, prefixes of training wrappers removed; pickled objects are refused."""
    if not path.is_file():
        raise BackboneError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        elif _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # loading TorchScript is deprecated; OpenAI's files are what they are
                state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise BackboneError(f"{path} cannot be read as weights: {first_line(error)}") from error
    except UnpicklingError as error:
        raise BackboneError(f"{path} holds pickled objects in addition to tensors, which are never loaded.") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise BackboneError(f"{path} holds no named weights.")
    named = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _is_openai(state: dict[str, torch.Tensor]) -> bool:
    return "input_resolution" in state  # a buffer that only OpenAI's own files have


@dataclass(frozen=True)
class _Sizes:
    """What the shapes say."""

    vision: dict[str, int]
    text: dict[str, int]
    dim: int

    @classmethod
    def of(cls, state: dict[str, torch.Tensor], source: str) -> _Sizes:
        if any(name.startswith("visual.layer") for name in state):
            raise BackboneError(f"{source} is a ResNet CLIP, for which transformers has no class; install "
                                "clipadapt[open-clip] and load it by its open_clip name.")  # fmt: skip
        for name in ("visual.conv1.weight", "visual.positional_embedding", "token_embedding.weight", "text_projection"):
            if name not in state:
                raise BackboneError(f"{source} is not a CLIP in OpenAI's or OpenCLIP's ViT naming: it lacks {name!r}.")
        width, _, _, patch = state["visual.conv1.weight"].shape
        places = state["visual.positional_embedding"].shape[0] - 1
        side = round(places**0.5)
        text_width = state["token_embedding.weight"].shape[1]
        head = _HEAD_WIDTHS.get(width, 64)
        if width % head or text_width % 64 or side * side != places:
            raise BackboneError(f"{source} has towers of width {width} and {text_width}; only heads of 64 are known.")
        vision = {
            **_block_sizes(state, "visual.", width, width // head),
            "image_size": side * patch,
            "patch_size": patch,
        }
        vocabulary = state["token_embedding.weight"].shape[0]
        text = {
            **_block_sizes(state, "", text_width, text_width // 64),
            "max_position_embeddings": state["positional_embedding"].shape[0],
            "vocab_size": vocabulary,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        }
        return cls(vision, text, state["text_projection"].shape[1])


def _block_sizes(state: dict[str, torch.Tensor], prefix: str, width: int, heads: int) -> dict[str, int]:
    pattern = re.compile(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
    numbers = {int(match[1]) for name in state if (match := pattern.match(name))}
    return {
        "hidden_size": width,
        "intermediate_size": state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": len(numbers),
        "num_attention_heads": heads,
    }


def from_state_dict(
    state: dict[str, torch.Tensor],
    source: str,
    activation: str,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Pretrained:
    """A transformers CLIP from weights in OpenAI/OpenCLIP naming; float16 becomes float32."""
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    plain = {name.removeprefix("text."): tensor for name, tensor in state.items() if name not in _NOT_WEIGHTS}
    sizes = _Sizes.of(plain, source)
    renamed = dict(_renamed(plain, source))
    model = clip_model(sizes.text, sizes.vision, sizes.dim, activation, renamed, source)
    side = sizes.vision["image_size"]
    processor = image_processor(Preprocess(resize=side, crop=(side, side)).to_config())
    length, vocabulary = sizes.text["max_position_embeddings"], sizes.text["vocab_size"]
    words = None if tokenizer is None else read_tokenizer(tokenizer, vocabulary, length)
    return Pretrained("clip", model, processor, words)


def _renamed(state: dict[str, torch.Tensor], source: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        tensor = tensor.detach().float()
        if name in _OUTER_NAMES:
            yield _OUTER_NAMES[name], tensor
        elif name in _TRANSPOSED:
            yield _TRANSPOSED[name], tensor.T.contiguous()
        elif match := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name):
            tower = "vision_model" if match[1] else "text_model"
            if match[3] not in _BLOCK_NAMES:
                raise BackboneError(f"{source} has weights that CLIP has no place for: {name!r}.")
            yield f"{tower}.encoder.layers.{match[2]}.{_BLOCK_NAMES[match[3]]}.{match[4]}", tensor
        elif match := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name):
            tower = "vision_model" if match[1] else "text_model"
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{tower}.encoder.layers.{match[2]}.self_attn.{letter}_proj.{match[3]}", part.contiguous()
        else:
            raise BackboneError(f"{source} has weights that CLIP has no place for: {name!r}.")


# -- vocabulary ------------------------------------------------------------------------------------------------------


def read_tokenizer(source: str | os.PathLike[str], vocabulary: int, length: int) -> Any:
    """CLIP's tokenizer with `vocabulary` entries for texts of `length`, from a folder, a hub id or a merges file."""
    path = Path(source)
    tokenizer = _from_merges(path, vocabulary, length) if path.is_file() else load_tokenizer(str(source))
    if len(tokenizer) != vocabulary or tokenizer.eos_token_id != vocabulary - 1:
        raise BackboneError(
            f"The tokenizer {source} has {len(tokenizer)} entries and end token {tokenizer.eos_token_id}, but the "
            f"weights have {vocabulary} and {vocabulary - 1}."
        )
    return tokenizer


def _from_merges(path: Path, vocabulary: int, length: int) -> Any:
    """Bytes, bytes ending a word, merges in order, the two special tokens: CLIP's order of ids."""
    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8").split("\n")
    # the first line is a header, and the file goes on beyond what the model uses
    merges = [tuple(line.split()) for line in lines[1 : vocabulary - 512 - 2 + 1]]
    if any(len(merge) != 2 for merge in merges) or len(merges) != vocabulary - 514:
        raise BackboneError(f"{path} is not a merges file for {vocabulary} tokens: one pair on each line is expected.")
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return clip_tokenizer(vocab, merges, length)


def _byte_letters() -> list[str]:
    """One printable letter for each byte, printable bytes first: GPT-2's alphabet, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
