"""How something is seen: items are prepared one by one, in workers, and encoded in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from clipadapt.data import Item
from clipadapt.errors import ClipadaptError


class Encoder(Protocol):
    """What `encode_images` needs. A backbone is one; prompted towers, views and the like wrap one.

    Attributes:
        source: what it is called in messages.
        dim: K, the length of a feature.
        device: where batches are encoded.
        image_size: (height, width) of what `prepare` makes of an image.
        fingerprint: of all that changes a feature; kept features are found by it. None: features are not kept.
        image_fingerprint: the same of the image side alone, which embeddings are found by.
        aligned: whether features live in one space with the model's texts.
    """

    @property
    def source(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def fingerprint(self) -> str | None: ...

    @property
    def image_fingerprint(self) -> str | None: ...

    @property
    def aligned(self) -> bool: ...

    def prepare(self, item: Item) -> torch.Tensor:
        """Decode and transform one item, (3, H, W) for an image; called in workers."""

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, K), with gradients to the batch."""


@dataclass(frozen=True, eq=False)
class Adapted:
    """A backbone whose images are encoded in another way: `encode` takes (B, 3, H, W) to (B, `dim`).

    Without a `fingerprint` its features cannot be kept: pass `cache=False`.
    """

    backbone: Any
    encode: Callable[[torch.Tensor], torch.Tensor]
    dim: int
    fingerprint: str | None = None
    aligned: bool = False

    @property
    def image_fingerprint(self) -> str | None:
        return self.fingerprint

    @property
    def source(self) -> str:
        return self.backbone.source

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def image_size(self) -> tuple[int, int]:
        return self.backbone.image_size

    def prepare(self, item: Item) -> torch.Tensor:
        """As the backbone does it."""
        return self.backbone.prepare(item)


def in_text_space(encoder: Any) -> Any:
    """The encoder itself; ClipadaptError if its image features do not live in the text space."""
    if not encoder.aligned:
        raise ClipadaptError(
            f"The model produces {encoder.dim}-dimensional image features that are not comparable with text features: "
            "embed or search without the model."
        )
    return encoder
