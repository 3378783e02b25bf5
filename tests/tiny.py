"""Tiny random backbones of every family, as plain transformers folders, made once per test session."""

from __future__ import annotations

import json
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from clipadapt.backbones.trunk import TrunkClipConfig, TrunkClipModel

_WORDS = ["a", "photo", "of", "the", "red", "blue", "green", "cat", "dog", "house", "star", "circle", "small", "large"]
_ROOT = tempfile.TemporaryDirectory(prefix="clipadapt-tiny-")


def tiny_clip() -> Path:
    """Folder of a random CLIP: 32 px, patch 8 (grid 4 x 4), widths 32 and 24, 3 blocks each, dim 16."""
    return tiny("clip")


def tiny_siglip() -> Path:
    """Folder of a random SigLIP of the same size; text is padded to 16 tokens."""
    return tiny("siglip")


@cache
def tiny(family: str) -> Path:
    """Folder of a random model of one of the FAMILIES; the same weights in every session."""
    folder = Path(_ROOT.name) / family
    tokenizer = _TOKENIZERS[family]()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _MODELS[family](tokenizer)
        for name, parameter in model.named_parameters():  # tiny widths need larger weights to make pictures differ
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3 if "embedding" in name else 0.15)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.logit_scale.data.fill_(3.0)
        if hasattr(model, "logit_bias"):
            model.logit_bias.data.fill_(-5.0)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[family]))
    return folder


# -- tokenizers -------------------------------------------------------------------------------------------------------


def _bpe_tokenizer() -> Any:
    """CLIP's own form: bytes of each word, merged up to the whole word for a few words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = _merges("</w>")
    tokens += dict.fromkeys(left + right for left, right in merges)
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def _gemma_tokenizer() -> Any:
    """SigLIP 2's form: the whole text in pieces, spaces as a letter of their own."""
    merges = _merges("")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.ascii_lowercase, ".", ","]
    tokens += dict.fromkeys(left + right for left, right in merges)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.Siglip2Tokenizer(vocab=vocab, merges=merges, model_max_length=16, add_eos_token=True)


def _merges(ending: str) -> Any:
    """Byte-pair merges that build each of the words from its letters, left to right."""
    merges = []
    for word in _WORDS:
        left, *rest = [*word[:-1], word[-1] + ending]
        for right in rest:
            merges.append((left, right))
            left += right
    return list(dict.fromkeys(merges))


def _word_tokenizer(*, pad: str, start: str | None, end: str, unknown: str, specials: list[str]) -> Any:
    """Whole words and single letters, with the special tokens a sentence-piece or word-piece model would add."""
    tokens = dict.fromkeys([*specials, *_WORDS, *string.ascii_lowercase, ".", ","])
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    used = [(token, vocab[token]) for token in (start, end) if token]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}" if start else f"$A {end}", special_tokens=used
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=end, bos_token=start, unk_token=unknown, model_max_length=16
    )


def _xlm_tokenizer() -> Any:
    return _word_tokenizer(
        pad="<pad>", start="<s>", end="</s>", unknown="<unk>", specials=["<s>", "<pad>", "</s>", "<unk>"]
    )


_TOKENIZERS = {
    "clip": _bpe_tokenizer,
    "clip_trunk": _bpe_tokenizer,
    "metaclip_2": _xlm_tokenizer,
    "siglip": lambda: _word_tokenizer(
        pad="</s>", start=None, end="</s>", unknown="<unk>", specials=["<pad>", "</s>", "<unk>"]
    ),
    "siglip2": _gemma_tokenizer,
    "altclip": _xlm_tokenizer,
    "chinese_clip": lambda: _word_tokenizer(
        pad="[PAD]", start="[CLS]", end="[SEP]", unknown="[UNK]", specials=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    ),
}

# -- models -----------------------------------------------------------------------------------------------------------

_BLOCKS = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
_VISION = {**_BLOCKS, "hidden_size": 32, "image_size": 32, "patch_size": 8, "projection_dim": 16}
_TEXT = {**_BLOCKS, "hidden_size": 24, "max_position_embeddings": 16}


def _text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**_TEXT, **ids, "vocab_size": len(tokenizer), **more}


def _clip(tokenizer: Any) -> Any:
    text = _text_config(tokenizer, projection_dim=16)
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    return transformers.CLIPModel(config)


def _clip_trunk(tokenizer: Any) -> Any:
    text = _text_config(tokenizer, projection_dim=16)
    trunk = {"stages": [[1, 3, 1, 1, 8], [2, 5, 2, 2, 8], [1, 3, 2, 2, 12]], "stem": 8, "head": 16}
    vision = {**_VISION, "trunk": trunk}
    return TrunkClipModel(TrunkClipConfig(text_config=text, vision_config=vision, projection_dim=16))


def _metaclip_2(tokenizer: Any) -> Any:
    text = _text_config(tokenizer, projection_dim=16)
    config = transformers.MetaClip2Config(text_config=text, vision_config=_VISION, projection_dim=16)
    return transformers.MetaClip2Model(config)


def _siglip(tokenizer: Any) -> Any:
    text = _text_config(tokenizer, projection_size=32)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=_VISION))


def _siglip2(tokenizer: Any) -> Any:
    text = _text_config(tokenizer, projection_size=32)
    vision = {**_VISION, "num_patches": 16}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))


def _altclip(tokenizer: Any) -> Any:
    text = _text_config(tokenizer, project_dim=20, max_position_embeddings=18, type_vocab_size=1)
    config = transformers.AltCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    return transformers.AltCLIPModel(config)


def _chinese_clip(tokenizer: Any) -> Any:
    text = _text_config(tokenizer, type_vocab_size=2)
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    return transformers.ChineseCLIPModel(config)


_MODELS = {
    "clip": _clip,
    "clip_trunk": _clip_trunk,
    "metaclip_2": _metaclip_2,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "altclip": _altclip,
    "chinese_clip": _chinese_clip,
}

_CROPPED = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}
_STRETCHED = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
_PROCESSORS = {
    "clip": _CROPPED,
    "clip_trunk": _CROPPED,
    "metaclip_2": _CROPPED,
    "siglip": _STRETCHED,
    "siglip2": {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 16},
    "altclip": _CROPPED,
    "chinese_clip": {**_CROPPED, "image_processor_type": "ChineseCLIPImageProcessor"},
}
