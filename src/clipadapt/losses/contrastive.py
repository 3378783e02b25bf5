"""Contrastive objectives over matched image and text features."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


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
        all_image = _Gather.apply(image, group)  # (wB, D)
        all_text = _Gather.apply(text, group)  # (wB, D)
        first = dist.get_rank(group) * len(image)
    target = torch.arange(first, first + len(image), device=image.device)  # (B,)
    image_loss = F.cross_entropy(logit_scale * image @ all_text.T, target)
    text_loss = F.cross_entropy(logit_scale * text @ all_image.T, target)
    return (image_loss + text_loss) / 2


class _Gather(torch.autograd.Function):
    """The rows of all processes in the order of their ranks; backward, a row sums the gradients it has in each."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, rows.contiguous(), group=group)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.rows
        return gradient[first : first + ctx.rows], None


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """SimCLR's loss (arXiv 2002.05709): each of 2 B views picks the other view of its picture among the 2 B - 1 others.

    first, second: (B, D), unit or not; row i of both shows the same picture. Returns a scalar in nats, 0 for B = 1.
    """
    views = F.normalize(torch.cat([first, second]).float(), dim=1)  # (2 B, D)
    scores = views @ views.T / temperature
    scores = scores.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(views), device=views.device).roll(len(first)))
