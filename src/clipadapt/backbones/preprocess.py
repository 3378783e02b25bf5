"""From an image to the pixels a backbone was trained on: resize, centre crop, scale, normalise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """The image transform of one backbone; equal bit for bit to the PIL image processors of `transformers`.

    Two departures: SigLIP 2's flexible size becomes a square, and of an image more than 100 times as long as wide
    only the middle is resized, so that memory stays bounded.

    resize     shortest side in pixels (keeps the aspect ratio), or (height, width), or None
    crop       (height, width) of the centre crop (black where the image is smaller), or None
    resample   PIL's number of the filter (2 bilinear, 3 bicubic)
    rescale    factor on the values 0..255
    mean, std  per RGB channel, after rescaling
    """

    resize: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    resample: int = 3
    rescale: float = 1 / 255
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """Read the dictionary of a transformers image processor, its class defaults filled in."""
        size, crop = config.get("size") or {}, config.get("crop_size") or {}
        if "max_num_patches" in config:  # SigLIP 2 NaFlex: the square with that many patches
            side = int(config["max_num_patches"] ** 0.5) * config["patch_size"]
            size = {"height": side, "width": side}
        shortest = size.get("shortest_edge")
        resize = shortest if shortest else (size["height"], size["width"])
        return cls(
            resize=resize if config.get("do_resize", True) else None,
            crop=(crop["height"], crop["width"]) if config.get("do_center_crop") else None,
            resample=int(config.get("resample", 3)),
            rescale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
            mean=tuple(config["image_mean"]) if config.get("do_normalize", True) else (0.0, 0.0, 0.0),
            std=tuple(config["image_std"]) if config.get("do_normalize", True) else (1.0, 1.0, 1.0),
        )

    def to_config(self) -> dict[str, Any]:
        """The same transform as the content of a `preprocessor_config.json`."""
        size = {"shortest_edge": self.resize} if isinstance(self.resize, int) else _height_width(self.resize)
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": self.resize is not None,
            "size": size or {"shortest_edge": 224},
            "do_center_crop": self.crop is not None,
            "crop_size": _height_width(self.crop) or {"height": 224, "width": 224},
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """A PIL image of any mode -> (3, H, W) float32; transparency is laid on white."""
        image = to_rgb(image)
        if isinstance(self.resize, int) and self.crop is not None:
            image = _bounded(image)
        if self.resize is not None:
            image = image.resize(_target_size(image.size, self.resize), self.resample)
        values = np.asarray(image)  # (H, W, 3) uint8
        if self.crop is not None:
            values = _centre_crop(values, *self.crop)
        table = _value_table(self.rescale, self.mean, self.std)
        planes = [table[channel][values[:, :, channel]] for channel in range(3)]
        return torch.from_numpy(np.stack(planes))

    def of_bytes(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bytes (B, 3, H, W) of RGB images that have their size already -> (B, 3, H, W) float32."""
        table = torch.from_numpy(_value_table(self.rescale, self.mean, self.std))
        return torch.stack([table[channel][pixels[:, channel].long()] for channel in range(3)], 1)

    def seen(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Which part of an image of `size` (width, height) is left: left, top, right, bottom, each a share in [0, 1].

        Where the image is smaller than the crop, all of it.
        """
        if self.crop is None:
            return 0.0, 0.0, 1.0, 1.0
        width, height = size if self.resize is None else _target_size(size, self.resize)
        across, down = min(self.crop[1] / width, 1) / 2, min(self.crop[0] / height, 1) / 2
        return 0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with any transparency composited on white."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")


@lru_cache(maxsize=64)
def _value_table(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Every possible output: (3, 256) float32, indexed by channel and 8-bit value.

    Rescaling happens in float64 and is rounded to float32 before mean and deviation, as the reference does.
    """
    scaled = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)  # (256,)
    mean_, std_ = np.array(mean, np.float32)[:, None], np.array(std, np.float32)[:, None]
    return (scaled - mean_) / std_  # (3, 256)


def _bounded(image: Image.Image) -> Image.Image:
    """The middle of an image more than 100 times as long as wide, whose enlargement could exhaust the memory."""
    width, height = image.size
    longest = 100 * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _target_size(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    """PIL's (width, height) after resizing an image of `size` (width, height)."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    long = int(resize * max(size) / min(size))
    return (resize, long) if width <= height else (long, resize)


def _centre_crop(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) -> (height, width, 3), zeros where the image is too small."""
    pad_h, pad_w = max(height - values.shape[0], 0), max(width - values.shape[1], 0)
    if pad_h or pad_w:
        before_h, before_w = -(-pad_h // 2), -(-pad_w // 2)
        values = np.pad(values, ((before_h, pad_h - before_h), (before_w, pad_w - before_w), (0, 0)))
    top, left = (values.shape[0] - height) // 2, (values.shape[1] - width) // 2
    return values[top : top + height, left : left + width]


def _height_width(size: tuple[int, int] | None) -> dict[str, int] | None:
    return None if size is None else {"height": size[0], "width": size[1]}
