"""A convolutional trunk in its official form, with batch norm: random weights, and what they compute layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, pad, relu6

from clipadapt.backbones.trunk import EPSILON


class Official:
    """A trunk of some stages; its weights are drawn as pixels first pass through, under the official names."""

    def __init__(self, stages: Sequence[Sequence[int]], stem: int, head: int) -> None:
        self.stages, self.stem, self.head = stages, stem, head
        self.generator = torch.Generator().manual_seed(0)
        self.weights: dict[str, Tensor] = {}

    def layer(self, rows: Tensor, name: str, norm: str, kernel: int, out: int, *, stride=1, groups=1) -> Tensor:
        shape = (out, rows.shape[1] // groups, kernel, kernel)
        weight = torch.randn(shape, generator=self.generator) / math.sqrt(math.prod(shape[1:]))
        scale, shift, mean, variance = (torch.rand(4, out, generator=self.generator) + 0.5).unbind()
        self.weights |= {f"{name}.weight": weight, f"{norm}.weight": scale, f"{norm}.bias": shift}
        self.weights |= {f"{norm}.running_mean": mean, f"{norm}.running_var": variance}
        missing = max(kernel - stride, 0)  # TensorFlow's padding of sizes that the stride divides
        rows = pad(rows, (missing // 2, missing - missing // 2) * 2)
        rows = conv2d(rows, weight, stride=stride, groups=groups)
        return batch_norm(rows, mean, variance, scale, shift, eps=EPSILON)

    def __call__(self, rows: Tensor) -> Tensor:
        rows, number = relu6(self.layer(rows, "_conv_stem", "_bn0", 3, self.stem, stride=2)), 0
        for repeats, kernel, stride, factor, out in self.stages:
            for repeat in range(repeats):
                block, before, step = f"_blocks.{number}.", rows, 1 if repeat else stride
                if factor > 1:
                    rows = relu6(self.layer(rows, f"{block}_expand_conv", f"{block}_bn0", 1, factor * rows.shape[1]))
                wide = rows.shape[1]
                rows = self.layer(
                    rows, f"{block}_depthwise_conv", f"{block}_bn1", kernel, wide, stride=step, groups=wide
                )
                rows = self.layer(relu6(rows), f"{block}_project_conv", f"{block}_bn2", 1, out)
                rows = rows + before if rows.shape == before.shape else rows
                number += 1
        return relu6(self.layer(rows, "_conv_head", "_bn1", 1, self.head))
