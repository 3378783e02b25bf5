"""A small byte-pair vocabulary in CLIP's own form, learned from the texts a model will be trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], size: int = 6144, context_length: int = 32) -> CLIPTokenizer:
    """A CLIPTokenizer of at most `size` tokens for `texts`: lower case, byte level, words end in `</w>`.

    As in CLIP, ids run: the 256 bytes, the 256 bytes at a word's end, the learned pairs, start, end; any text can be
    written with them. The same texts give the same vocabulary.
    """
    blank = CLIPTokenizer().backend_tokenizer  # for CLIP's normaliser and its way to split words
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    inner = sorted(ByteLevel.alphabet())
    alphabet = inner + [letter + "</w>" for letter in inner]
    trainer = BpeTrainer(
        vocab_size=size - 2,
        special_tokens=alphabet,  # fixes their ids: equally frequent pairs are ranked by id, in any process alike
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)  # type: ignore[arg-type]
