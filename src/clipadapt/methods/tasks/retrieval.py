"""Retrieval: which images a text describes, and which texts an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clipadapt.data import Pairs, as_items
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images
from clipadapt.methods.base import Method
from clipadapt.metrics.retrieval import image_to_text, text_to_image


class Retriever(Method):
    """Answers with the items of a gallery that fit a query best; its towers are `backbone_`."""

    task: ClassVar[str] = "retriever"

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """T texts -> (T, D) unit features."""
        with torch.no_grad():
            return self._model("it has no text tower").encode_texts(list(texts)).float().cpu()

    def encode_images(self, images: Any) -> Tensor:
        """N images (paths, PIL, a data set) -> (N, D) unit features."""
        return encode_images(self._model("it has no image tower"), images).features

    def rank(self, queries: Any, gallery: Any, k: int = 10) -> list[list[int]]:
        """For each query the positions in `gallery` of its k best items, best first.

        Args:
            queries: texts (a list of strings) or images.
            gallery: images or texts, likewise.
            k: at least 1; all items where there are fewer.
        """
        if k < 1:
            raise ClipadaptError(f"rank: k must be at least 1, not {k}.")
        scores = self._encoded(queries) @ self._encoded(gallery).T  # (Q, N)
        return scores.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()

    def _encoded(self, items: Any) -> Tensor:
        texts = isinstance(items, list | tuple) and len(items) > 0 and all(isinstance(item, str) for item in items)
        return self.encode_texts(items) if texts else self.encode_images(as_items(items))

    def score(self, pairs: Pairs) -> float:
        """Recall at 1 in [0, 1], the mean of both directions, on images with one or more captions each."""
        if not len(pairs):
            raise ClipadaptError("score needs at least one image with a caption.")
        owner = np.array([number for number, captions in enumerate(pairs.captions) for _ in captions])
        texts = self.encode_texts([caption for captions in pairs.captions for caption in captions])  # (T, D)
        images = self.encode_images(pairs.items)  # (N, D)
        found = text_to_image(texts, images, owner, ks=(1,)), image_to_text(images, texts, owner, ks=(1,))
        return sum(direction.recall[1] for direction in found) / 2
