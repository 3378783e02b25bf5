"""The image tower of a backbone: pixels to features of images and of their patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipadapt.backbones.families import FAMILIES
from clipadapt.backbones.tower import Tower, unit
from clipadapt.errors import BackboneError


@dataclass(frozen=True)
class ImageTokens:
    """What `encode_images(pixels, tokens=True)` gives.

    pooled    (B, D) the image features
    patches   (B, N, D) one feature per patch in the same joint space, row by row over `grid`
    grid      (h, w), h * w = N
    inserted  (B, n, W) rows put in by `Backbone.inserted`, after the tower's last norm and before any projection
    """

    pooled: Tensor
    patches: Tensor
    grid: tuple[int, int]
    inserted: Tensor


class ImageTower(Tower):
    """A tower of images.

    class_token  whether row 0 stands for the image; elsewhere a head pools the patches
    trunk        whether patches come from a convolutional trunk (see `patches`)
    """

    def __init__(self, model: nn.Module, family: str, dim: int) -> None:
        super().__init__(model, "vision", FAMILIES[family].vision)
        self.class_token, self._patchified = FAMILIES[family].class_token, FAMILIES[family].patchified
        self.trunk, self.dim = FAMILIES[family].trunk, dim

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    @property
    def channels(self) -> int:
        """Channels of the pixels: red, green and blue, and those that `edits.ExtraChannels` added."""
        return self.config.num_channels

    @property
    def fill(self) -> float | None:
        """The value of added channels in pixels that lack them; None without added channels."""
        return getattr(self.config, "extra_channels_fill", None)

    def encode(self, pixels: Tensor, *, tokens: bool = False, normalize: bool = True) -> Any:
        """See `Backbone.encode_images`."""
        if self.trunk and pixels.ndim == 4 and pixels.shape[1] == self.width:  # patches
            grid = (pixels.shape[2], pixels.shape[3])
        else:
            pixels = self._with_all_channels(pixels)
            grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        if not all(grid):
            raise BackboneError(
                f"Images of {tuple(pixels.shape[2:])} pixels are smaller than one patch of {self.patch_size}."
            )
        if pixels.shape[0] == 0:
            none = torch.zeros(0, grid[0] * grid[1], self.dim, device=self.device)
            return ImageTokens(none[:, 0], none, grid, none[:, :0]) if tokens else none[:, 0]
        pixels = pixels.to(self.device)
        if self._patchified:
            output = self.model.get_image_features(**_patchify(pixels, self.patch_size))
        else:
            output = self.model.get_image_features(pixels, interpolate_pos_encoding=True)
        pooled = output.pooler_output  # (B, D)
        if not tokens:
            return unit(pooled, normalize)
        norm = self.part("norm")
        rows = output.last_hidden_state  # (B, 1 + N, W), or (B, N, W) already normed
        patches = self.project_rows(norm(rows[:, 1:]) if self.class_token else rows)
        prompted = self.prompted
        taken = rows[:, :0] if prompted is None or prompted.taken is None else prompted.taken
        return ImageTokens(unit(pooled, normalize), unit(patches, normalize), grid, norm(taken))

    def patches(self, pixels: Tensor) -> Tensor:
        """See `Backbone.encode_patches`."""
        if not self.trunk:
            raise BackboneError("This image tower has no trunk whose patches could be kept.")
        pixels = self._with_all_channels(pixels).to(self.device)
        return self.part("embeddings").patch_embedding(pixels)

    def project_rows(self, rows: Tensor) -> Tensor:
        """Rows behind the last norm (B, N, W), such as `ImageTokens.inserted`, -> (B, N, D).

        A pooling head sees each row as if it were the whole image.
        """
        if self.class_token:
            return self.model.visual_projection(rows)
        alone = rows.reshape(-1, 1, rows.shape[-1])  # (B * N, 1, W)
        return self.model.vision_model.head(alone).reshape(*rows.shape[:2], -1)

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, L, W) as the last block leaves them -> image features (B, D), not normalised."""
        if self.class_token:
            return self.model.visual_projection(self.part("norm")(hidden[:, 0]))
        return self.model.vision_model.head(self.part("norm")(hidden))

    def _with_all_channels(self, pixels: Tensor) -> Tensor:
        if pixels.ndim == 4 and pixels.shape[1] == 3 < self.channels and self.fill is not None:
            shape = (len(pixels), self.channels - 3, *pixels.shape[2:])
            return torch.cat([pixels, pixels.new_full(shape, self.fill)], 1)
        if pixels.ndim != 4 or pixels.shape[1] != self.channels:
            raise BackboneError(f"Pixels must be (B, {self.channels}, H, W), but are {tuple(pixels.shape)}.")
        return pixels


def _patchify(pixels: Tensor, size: int) -> dict[str, Tensor]:
    """(B, C, H, W) -> flattened patches (B, N, size * size * C), their grid and a mask that hides none of them."""
    batch, height, width = pixels.shape[0], pixels.shape[2] // size, pixels.shape[3] // size
    cut = pixels[:, :, : height * size, : width * size].unflatten(3, (width, size)).unflatten(2, (height, size))
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, height * width, -1)  # (B, h, w, size, size, C) flattened
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(batch, height * width, dtype=torch.int64, device=pixels.device),
        "spatial_shapes": torch.tensor([[height, width]] * batch, device=pixels.device),
    }
