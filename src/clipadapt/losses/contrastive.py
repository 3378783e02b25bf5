"""Contrastive objectives over matched image and text features."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    groups: Tensor | None = None,
    negatives: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020): each image picks its text among all texts, each text its image.

    With torch.distributed initialised, B is this process's share, the negatives are those of all processes of `group`,
    and the value is this process's part: the mean over processes is the loss of the whole batch. The gathered features
    carry gradients, so parameter gradients averaged over processes (what DistributedDataParallel does) equal those of
    one process that sees the whole batch.

    Args:
        image: (B, D) unit-norm; row i belongs to row i of `text`.
        text: (B, D) unit-norm.
        logit_scale: the multiplier of the cosines, already exponentiated.
        groups: (B,), equal for pairs that describe the same thing, such as equal captions: neither is a negative of
            the other.
        negatives: (B, K, D) unit-norm features of texts that are wrong for every image of the batch; images choose
            among them too (hard negatives, arXiv 2210.01936).
        group: of processes.

    Returns:
        A scalar in nats.
    """
    image, text = image.float(), text.float()
    several = dist.is_initialized() and dist.get_world_size(group) > 1

    def everywhere(rows: Tensor) -> Tensor:
        return _Gather.apply(rows, group) if several else rows

    all_image, all_text = everywhere(image), everywhere(text)  # (wB, D)
    first = dist.get_rank(group) * len(image) if several else 0
    target = torch.arange(first, first + len(image), device=image.device)  # (B,)
    to_texts = logit_scale * image @ all_text.T  # (B, wB)
    to_images = logit_scale * text @ all_image.T
    if groups is not None:
        same = groups[:, None] == everywhere(groups)  # (B, wB)
        same[torch.arange(len(target), device=image.device), target] = False
        to_texts, to_images = (logits.masked_fill(same, -torch.inf) for logits in (to_texts, to_images))
    if negatives is not None:
        wrong = everywhere(negatives.float().flatten(0, 1))  # (wBK, D)
        to_texts = torch.cat([to_texts, logit_scale * image @ wrong.T], dim=1)
    return (F.cross_entropy(to_texts, target) + F.cross_entropy(to_images, target)) / 2


def contrast(out: dict[str, Tensor]) -> Tensor:
    """InfoNCE as an objective (`training.objective`): of `image`, `text`, `scale` and, if given, `groups`, `negatives`.

    Where an item has K texts, `text` is (B, K, D): the mean over the K losses of all images with their k-th texts.
    """
    text, groups, negatives = out["text"], out.get("groups"), out.get("negatives")
    losses = [
        info_nce(out["image"], one, out["scale"], groups=groups, negatives=negatives)
        for one in (text.unbind(1) if text.ndim == 3 else [text])
    ]
    return torch.stack(losses).mean()


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
    """SimCLR's loss (arXiv 2002.05709): each of 2 B views picks the other view of its image among the 2 B - 1 others.

    first, second: (B, D), unit or not; row i of both shows the same image. Returns a scalar in nats, 0 for B = 1.
    """
    views = F.normalize(torch.cat([first, second]).float(), dim=1)  # (2 B, D)
    scores = views @ views.T / temperature
    scores = scores.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(views), device=views.device).roll(len(first)))
