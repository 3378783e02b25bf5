"""Other ways for a block to attend: which projections are compared, a bias on the scores, and the maps to read.

Only a block's configuration is exchanged, which transformers' own forward honours, so the tower masks as before.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clipadapt.backbones.families import register_attention
from clipadapt.backbones.tower import Tower
from clipadapt.errors import BackboneError

ATTENTION = "clipadapt"  # the name under which transformers finds `_attend`


@dataclass(eq=False)
class _Way:
    """How one block attends; travels in the block's own copy of the configuration."""

    pairs: tuple[tuple[str, str], ...]  # (("q", "k"),), ... ; empty: every row sees itself only
    bias: torch.Tensor | None
    maps: dict[int, torch.Tensor] | None  # where its weights are left, by block; None: nowhere
    layer: int


def _attend(
    module: nn.Module,
    query: torch.Tensor,  # (B, heads, N, C)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    way: _Way = module.config.attention_way  # type: ignore[assignment,union-attr]
    rows = query.shape[2]
    projections = {"q": query, "k": key, "v": value}
    hidden: torch.Tensor | None = None  # True where attention is forbidden
    if is_causal and attention_mask is None:  # transformers leaves the causal mask to the attention function
        hidden = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    weights = torch.eye(rows, device=query.device, dtype=query.dtype).expand(*query.shape[:2], -1, -1)
    if way.pairs:
        weights = torch.zeros_like(weights)
    for left, right in way.pairs:
        scores = projections[left] @ projections[right].transpose(-1, -2) * scaling  # (B, heads, N, N)
        if way.bias is not None:
            scores = scores + way.bias.to(scores)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        elif attention_mask is not None and attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        elif attention_mask is not None:
            scores = scores + attention_mask
        weights = weights + scores.softmax(-1)
    if way.maps is not None:
        way.maps[way.layer] = weights
    dropped = nn.functional.dropout(weights, dropout, module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights


register_attention(ATTENTION, _attend)


def attention_pairs(mode: str) -> tuple[tuple[str, str], ...]:
    """ "vv" -> (("v", "v"),), and so on; refuses anything else."""
    if mode == "identity":
        return ()
    pairs = [re.fullmatch("([qkv])([qkv])", pair) for pair in mode.split("+")]
    if None in pairs:
        raise BackboneError(
            f'Unknown attention mode {mode!r}; use pairs of q, k and v such as "vv" or "qq+kk", or "identity".'
        )
    return tuple((pair[1], pair[2]) for pair in pairs if pair)


def set_way(
    module: Any, mode: str, layer: int, bias: torch.Tensor | None = None, maps: dict[int, torch.Tensor] | None = None
) -> None:
    """Make an attention module attend in another way, by a configuration of its own."""
    config = copy.copy(module.config)
    config._attn_implementation = ATTENTION
    config.attention_way = _Way(attention_pairs(mode), bias, maps, layer)
    module.config = config


@contextmanager
def changed_attention(
    tower: Tower, layers: Sequence[int], mode: str, bias: torch.Tensor | None
) -> Iterator[dict[int, torch.Tensor]]:
    """See `Model.attention`."""
    attention_pairs(mode)
    maps: dict[int, torch.Tensor] = {}
    before: list[tuple[Any, Any]] = []
    with tower.changed_by("attention"):
        try:
            for layer in layers:
                module = tower.attention(layer)
                before.append((module, module.config))
                set_way(module, mode, layer, bias, maps)
            yield maps
        finally:
            for module, config in reversed(before):
                module.config = config
