"""What every model of images and texts in one space has, whatever library runs its towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Self

import torch
from PIL import Image

from clipadapt.backbones.model import Model
from clipadapt.data.items import Item


class TwoTowers(Model):
    """A frozen image tower and text tower that share one space; an encoder of images.

    family      "clip", "siglip", ... or "open_clip"
    processor   the image processor that is saved with it, or None
    tokenizer   None where only token ids can be encoded
    preprocess  PIL image -> (3, H, W) float32
    image_size  (height, width) that `preprocess` gives
    dim         D, length of a feature

    Each kind of model says how it encodes:

    encode_images  pixels (B, 3, H, W) -> image features (B, D), of unit length unless `normalize` is off
    tokenize       T texts -> token ids (T, L) int64
    encode_tokens  token ids (T, L) -> text features (T, D), of unit length unless `normalize` is off
    """

    kind: ClassVar[str] = "backbone"  # as a fitted method has a kind, too
    aligned: ClassVar[bool] = True  # image and text features live in one space
    family: str
    processor: Any
    tokenizer: Any
    preprocess: Callable[[Image.Image], torch.Tensor]
    image_size: tuple[int, int]
    dim: int
    encode_images: Callable[..., Any]
    tokenize: Callable[[Sequence[str]], torch.Tensor]
    encode_tokens: Callable[..., Any]

    @property
    def logit_scale(self) -> float:
        """The learned factor on cosines, e.g. 100.0.

        Its parameter is a scalar in most families, which FSDP2 cannot shard: name it in `ignored_params`.
        """
        return float(self.model.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> float:
        """Added after the factor; 0 except for models trained with the sigmoid loss."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    @property
    def image_fingerprint(self) -> str:
        """The fingerprint of what encodes images alone: embeddings of images are good for all models that share it."""
        return self._fingerprint("vision")

    @property
    def encoder(self) -> Self:
        """What sees images: itself, as a fitted method has an `encoder`, too."""
        return self

    # -- encoding ---------------------------------------------------------------------------------------------------

    def prepare(self, item: Item) -> torch.Tensor:
        """An image item -> what `encode` takes a batch of: its pixels (3, H, W). For use in a worker."""
        return self.preprocess(item.open())

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """Prepared items (B, 3, H, W) -> unit features (B, D), with gradients unless the caller stops them."""
        return self.encode_images(batch)

    def encode_texts(self, texts: Sequence[str], *, normalize: bool = True) -> torch.Tensor:
        """T texts -> (T, D), of unit length unless `normalize` is off. All go through the tower in one batch."""
        return self.encode_tokens(self.tokenize(texts), normalize=normalize)

    # -- identity and copies ----------------------------------------------------------------------------------------

    def copy(self) -> Self:
        """An independent model with its own weights and tokenizer."""
        other = super().copy()
        other.tokenizer = deepcopy(self.tokenizer)
        return other

    def _facts(self) -> tuple[Any, ...]:
        return self.preprocess, self.tokenizer, getattr(self.tokenizer, "model_max_length", None)
