"""The golden figures of prompt methods (golden/README-prompts.md), and their tiny CLIP with a tokenizer for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipadapt.backbones import Backbone, load_backbone

TOLERANCE = 5e-5  # relative to the largest value of an array: what the golden page calls comfortable
NAMES = [f"class{c}" for c in range(5)]  # as the tokenizer below knows them
_WORDS = {"X": 343, ".": 269, ",": 267, "a": 320, "photo": 125, "of": 399, "the": 278, "type": 171}
_WORDS |= {"pet": 451, "bad": 42, "my": 201, "itap": 333}


class GoldenTokenizer:
    """Words and class names to the ids that the golden page gives them."""

    all_special_tokens = ("<start>", "<end>")
    pad_token_id = 0

    def __init__(self, class_tokens: np.ndarray) -> None:
        self.words = {word: [number] for word, number in _WORDS.items()}
        self.words |= {NAMES[c]: [int(i) for i in row if i >= 0] for c, row in enumerate(class_tokens)}

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        split = [re.findall(r"\w+|[.,]", text) for text in texts]
        return {"input_ids": [[510, *(i for word in words for i in self.words.get(word, [0])), 511] for words in split]}

    def get_vocab(self) -> dict[str, int]:
        return dict(_WORDS)


def golden_backbone(shared: Path) -> Backbone:
    """The tiny CLIP of the golden files; texts may use the words of the golden page and `NAMES`."""
    backbone = load_backbone(shared / "golden" / "tiny_clip.safetensors", activation="quick_gelu")
    backbone.tokenizer = GoldenTokenizer(np.load(shared / "golden" / "coop.npz")["class_tokens"])
    return backbone


class Golden:
    """The arrays of one golden file as tensors: those of a variant, else those that all variants share."""

    def __init__(self, shared: Path, name: str, variant: str = "") -> None:
        self.arrays, self.variant = np.load(shared / "golden" / f"{name}.npz"), variant

    def __contains__(self, name: str) -> bool:
        return f"{self.variant}/{name}" in self.arrays or name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        key = f"{self.variant}/{name}"
        return torch.from_numpy(self.arrays[key if key in self.arrays else name])

    def names(self, prefix: str = "") -> list[str]:
        """Names of the variant's arrays that begin with `prefix`, without the variant."""
        start = f"{self.variant}/{prefix}" if self.variant else prefix
        return [k.removeprefix(f"{self.variant}/") for k in self.arrays if k.startswith(start)]


def assert_close(ours: Tensor, golden: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal up to `tolerance` of the golden array's largest value."""
    ours = ours.detach()
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max() <= tolerance * max(float(golden.abs().max()), 1e-30)
