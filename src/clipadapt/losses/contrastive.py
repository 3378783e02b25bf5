"""Contrastive objectives over matched image and text features."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def info_nce(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020): each picture picks its text among all texts, each text its picture.

    image, text: (B, D) unit-norm; row i of one belongs to row i of the other. logit_scale: the multiplier of the
    cosines, already exponentiated. Returns a scalar in nats.

    With torch.distributed initialised, B is this process's share, the negatives are those of all processes of `group`,
    and the value is this process's part: the mean over processes is the loss of the whole batch. The gathered features
    carry gradients, so parameter gradients averaged over processes (what DistributedDataParallel does) equal those of
    one process that sees the whole batch.
    """
    image, text = image.float(), text.float()
    all_image, all_text, first = image, text, 0
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        all_image = torch.cat(all_gather(image, group=group))  # (wB, D)
        all_text = torch.cat(all_gather(text, group=group))  # (wB, D)
        first = dist.get_rank(group) * len(image)
    target = torch.arange(first, first + len(image), device=image.device)  # (B,)
    image_loss = F.cross_entropy(logit_scale * image @ all_text.T, target)
    text_loss = F.cross_entropy(logit_scale * text @ all_image.T, target)
    return (image_loss + text_loss) / 2
