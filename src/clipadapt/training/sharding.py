"""Weights, gradients and optimiser state shared out over processes (FSDP2), and tensors whole again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Leave each process its share of every parameter of `module`, in place; the rest is fetched block by block.

    No parameter may be a scalar, which cannot be shared out. `blocks` are those whose weights are needed together.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, this process's share, where `like` is shared out."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
