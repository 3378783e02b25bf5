"""The model families, told apart by one table of attribute names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AttentionInterface

from clipadapt.backbones import trunk
from clipadapt.errors import BackboneError

TowerName = Literal["text", "vision"]


@dataclass(frozen=True)
class TowerParts:
    """Where the parts of one tower are, as dotted names: from the model, or (attention, linears) from a block."""

    embeddings: str
    blocks: str
    norm: str  # after the last block
    config: str  # the tower's part of the model's configuration
    tokens: str = ""  # the table of token vectors (text towers)
    positions: str = ""  # the table of position vectors (causal text towers, and so the next two)
    projection: str = ""  # from the normed pooled row to the joint space
    pixels: str = ""  # the layer that sees pixels, or flattened patches of them (image towers)
    attention: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.out_proj"
    fc1: str = "mlp.fc1"
    fc2: str = "mlp.fc2"
    norm1: str = "layer_norm1"
    norm2: str = "layer_norm2"
    mlp: str = "mlp"


VIT = TowerParts(
    "vision_model.embeddings",
    "vision_model.encoder.layers",
    "vision_model.post_layernorm",
    "vision_config",
    pixels="vision_model.embeddings.patch_embedding",
)
GPT = TowerParts(
    "text_model.embeddings",
    "text_model.encoder.layers",
    "text_model.final_layer_norm",
    "text_config",
    tokens="text_model.embeddings.token_embedding",
    positions="text_model.embeddings.position_embedding",
    projection="text_projection",
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
ROBERTA = TowerParts(
    "text_model.roberta.embeddings",
    "text_model.roberta.encoder.layers",
    "text_model.pre_LN",
    "text_config",
    tokens="text_model.roberta.embeddings.word_embeddings",
    **_BERT_BLOCK,
)
BERT = TowerParts(
    "text_model.embeddings",
    "text_model.encoder.layer",
    "",
    "text_config",
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

    model: str  # class name
    text: TowerParts
    padding: Literal["causal", "masked", "fixed"]
    vision: TowerParts = VIT
    class_token: bool = True  # row 0 of the vision tower; without it a pooling head makes the image feature
    patchified: bool = False  # the vision tower takes flattened patches and their grid instead of pixels
    position_offset: int = 0  # rows of the position table that texts cannot use
    trunk: bool = False  # the vision tower sees patches through a convolutional trunk
    library: Any = transformers  # that has the class


FAMILIES: dict[str, Family] = {  # by `model_type` of config.json
    "clip": Family("CLIPModel", GPT, "causal"),
    "clip_trunk": Family(
        "TrunkClipModel", GPT, "causal", replace(VIT, pixels=f"{VIT.pixels}.layers.0"), trunk=True, library=trunk
    ),
    "metaclip_2": Family("MetaClip2Model", GPT, "causal"),
    "siglip": Family("SiglipModel", GPT, "fixed", class_token=False),
    "siglip2": Family("Siglip2Model", GPT, "fixed", class_token=False, patchified=True),
    "altclip": Family("AltCLIPModel", ROBERTA, "masked", position_offset=2),
    "chinese_clip": Family("ChineseCLIPModel", BERT, "masked"),
}

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")


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
        with quiet():
            config = transformers.AutoConfig.from_pretrained(source)
            if config.model_type not in FAMILIES:
                raise BackboneError(
                    f"{source} holds a model of type {config.model_type!r}; known are: {', '.join(sorted(FAMILIES))}."
                )
            family = FAMILIES[config.model_type]
            model = _with_weights(getattr(family.library, family.model), source, source, config=config)
            processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
            # where its files are missing, transformers would make an empty tokenizer and go on
            has_tokenizer = folder is None or any(any(folder.glob(name)) for name in _TOKENIZER_FILES)
            tokenizer = load_tokenizer(source) if has_tokenizer else None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if folder:
            raise BackboneError(f"The folder {source} is not a complete backbone: {first_line(error)}") from error
        raise BackboneError(
            f"There is no folder {source}, and as a hub id it cannot be loaded: {first_line(error)}"
        ) from error
    return Pretrained(config.model_type, model, processor, tokenizer)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder or hub id."""
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BackboneError(f"{source} has no tokenizer that can be read: {first_line(error)}") from error


def clip_model(
    text: dict[str, int], vision: dict[str, int], dim: int, activation: str, state: dict[str, torch.Tensor], source: str
) -> Any:
    """A CLIP of these sizes with exactly these weights, given under transformers' names."""
    shared = {"hidden_act": activation, "projection_dim": dim}
    config = transformers.CLIPConfig(
        text_config={**text, **shared}, vision_config={**vision, **shared}, projection_dim=dim
    )
    with quiet():
        return _with_weights(transformers.CLIPModel, None, source, config=config, state_dict=state)


def clip_tokenizer(vocab: dict[str, int], merges: Any, length: int) -> Any:
    """CLIP's byte-pair tokenizer for texts of at most `length` tokens."""
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def image_processor(config: dict[str, Any]) -> Any:
    """CLIP's image processor with the content of a preprocessor_config.json."""
    return transformers.CLIPImageProcessorPil(**{k: v for k, v in config.items() if k != "image_processor_type"})


def _with_weights(model_class: Any, name: str | None, source: str, **given: Any) -> Any:
    """The model with its weights as float32; refuses what transformers would fill at random and merely log."""
    model, report = model_class.from_pretrained(
        name,
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are reported
        **given,
    )
    absent = sorted([*report["missing_keys"], *(mismatch[0] for mismatch in report["mismatched_keys"])])
    if absent:
        raise BackboneError(
            f"{source} lacks {len(absent)} weights of its model or has them in another shape; one is {absent[0]!r}."
        )
    return model


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().split("\n")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and reports of transformers on the user's terminal, for as long as it lasts."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def register_attention(name: str, function: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    """Make `function` usable as `config._attn_implementation = name` of any attention module."""
    AttentionInterface.register(name, function)


def submodule(root: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name below `root`; an identity where the name is empty."""
    return root.get_submodule(name) if name else nn.Identity()
