"""A CLIP whose image tower sees patches through a convolutional trunk, EfficientNet-Lite, in the place of one product.

Everything behind the patch embedding is CLIP's own, so what adapts a vision transformer adapts this one. The trunk's
batch norm is folded into its convolutions (`folded`). Tan and Le, "EfficientNet" (arXiv 1905.11946); the Lite variants
of its official repository have no squeeze-and-excitation, ReLU6, and the same first and last layers in all sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

# (repeats, kernel, stride, factor of widening, channels) of each stage
LITE0 = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
         (1, 3, 1, 6, 320))  # fmt: skip
STEM, HEAD = 32, 1280  # channels of the first and of the last layer
EPSILON = 1e-3  # of its batch norm


class Convolution(nn.Conv2d):
    """A convolution that gives ceil(size / stride), padded as TensorFlow pads even sizes: at stride 2 more behind."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, *, groups: int = 1, bounded: bool = True):
        super().__init__(channels, out, kernel, stride, 0 if stride == 2 else kernel // 2, groups=groups)
        self.before, self.bounded = (kernel - 2) // 2, bounded

    def forward(self, rows: Tensor) -> Tensor:
        if self.stride[0] == 2:
            behind = self.kernel_size[0] - 2 - self.before
            rows = pad(rows, (self.before, behind, self.before, behind))
        rows = super().forward(rows)
        return relu6(rows) if self.bounded else rows


class Bottleneck(nn.Sequential):
    """Widened, convolved by channel, narrowed; added to its input where the shapes are equal."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, factor: int) -> None:
        wide = factor * channels
        widened = [Convolution(channels, wide, 1, 1)] if factor > 1 else []
        by_channel = Convolution(wide, wide, kernel, stride, groups=wide)
        super().__init__(*widened, by_channel, Convolution(wide, out, 1, 1, bounded=False))
        self.adds = stride == 1 and channels == out

    def forward(self, rows: Tensor) -> Tensor:
        out = super().forward(rows)
        return rows + out if self.adds else out


class Trunk(nn.Module):
    """Pixels (B, 3, H, W) -> patches (B, width, H // stride, W // stride); what exceeds that many is not seen.

    stride  product of all layers' strides: 32 for Lite
    """

    def __init__(
        self, width: int, stages: Sequence[Sequence[int]] = LITE0, stem: int = STEM, head: int = HEAD, inputs: int = 3
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [Convolution(inputs, stem, 3, 2)]
        channels, self.stride = stem, 2
        for repeats, kernel, stride, factor, out in stages:
            for number in range(repeats):
                layers.append(Bottleneck(channels, out, kernel, 1 if number else stride, factor))
                channels = out
            self.stride *= stride
        self.layers = nn.Sequential(*layers, Convolution(channels, head, 1, 1))
        self.projection = nn.Conv2d(head, width, 1)

    @property
    def weight(self) -> Tensor:
        """Whose type pixels are given, as in a plain patch embedding."""
        return self.projection.weight

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, head, H // stride, W // stride), before the projection."""
        height, width = (side // self.stride * self.stride for side in pixels.shape[2:])
        return self.layers(pixels[:, :, :height, :width].contiguous(memory_format=torch.channels_last))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(self.features(pixels))


class TrunkClipConfig(CLIPConfig):
    """CLIP's configuration; `vision_config` has `trunk`: the stages, `stem` and `head` of the trunk."""

    model_type = "clip_trunk"


class TrunkEmbeddings(CLIPVisionEmbeddings):
    """CLIP's embeddings of what a trunk gives; patches that have passed it may stand for pixels."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patch_embedding: Any = Trunk(self.embed_dim, **config.trunk, inputs=config.num_channels)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Pixels (B, 3, H, W), or patches (B, W, h, w), -> the rows (B, 1 + h w, W) that enter the blocks."""
        passed = pixel_values.shape[1] == self.embed_dim
        patches = pixel_values if passed else self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        side: Any = self.patch_size
        height, width = patches.shape[2] * side, patches.shape[3] * side
        if not interpolate_pos_encoding and {height, width} != {self.image_size}:
            raise ValueError(
                f"Images of {height} x {width} pixels; without interpolation the size is {self.image_size}."
            )
        rows = torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches.flatten(2).mT], 1)
        if interpolate_pos_encoding:
            return rows + self.interpolate_pos_encoding(rows, height, width)
        return rows + self.position_embedding(self.position_ids)


class TrunkClipModel(CLIPModel):
    """transformers' CLIP with a trunk as its patch embedding."""

    config_class = TrunkClipConfig

    def __init__(self, config: TrunkClipConfig) -> None:
        super().__init__(config)
        self.vision_model.embeddings = TrunkEmbeddings(config.vision_config)


AutoConfig.register(TrunkClipConfig.model_type, TrunkClipConfig)
AutoModel.register(TrunkClipConfig, TrunkClipModel)


def folded(weights: Mapping[str, Tensor], stages: Sequence[Sequence[int]] = LITE0) -> dict[str, Tensor]:
    """The official weights under their PyTorch names -> those of `Trunk.layers`, batch norm folded into them."""
    pairs: dict[str, tuple[str, str]] = {"0": ("_conv_stem", "_bn0")}
    number = 0
    for repeats, _, _, factor, _ in stages:
        for _ in range(repeats):
            names = [("_expand_conv", "_bn0")] if factor > 1 else []
            names += [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
            for place, (convolution, norm) in enumerate(names):
                pairs[f"{number + 1}.{place}"] = (f"_blocks.{number}.{convolution}", f"_blocks.{number}.{norm}")
            number += 1
    pairs[str(number + 1)] = ("_conv_head", "_bn1")
    out = {}
    for name, (convolution, norm) in pairs.items():
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + EPSILON).sqrt()
        out[f"{name}.weight"] = weights[f"{convolution}.weight"] * scale[:, None, None, None]
        out[f"{name}.bias"] = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return out
