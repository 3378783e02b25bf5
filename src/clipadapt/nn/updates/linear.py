"""Linear adapters behind linear layers, which merge into them.

    y + s F y                      F (W, W), or U D of rank r; y (..., W) what the layer gives
    W' = (I + s F) W, b' = (I + s F) b

Of R-Adapter (arXiv 2408.05749).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from clipadapt.nn.updates.sites import SiteUpdate, linear_site
from clipadapt.nn.updates.update import Change


class LinearAdapters(SiteUpdate):
    """A linear adapter behind each of the named linear layers.

    Args:
        model: Whose layers they are.
        sites: Names of linear layers.
        rank: Of each adapter; None is a full matrix.
        scale: Start of each adapter's learned factor s.
        drop: In training, the probability that an example goes past an adapter; in [0, 1).

    New adapters draw from torch's global stream. Saved as "parts.I.scale", "parts.I.down" and "parts.I.up" or
    "parts.I.full", numbered in the order of `sites`.
    """

    mergeable: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[str],
        rank: int | None = None,
        *,
        scale: float = 1.0,
        drop: float = 0.0,
    ) -> None:
        layers = {site: linear_site(model, site, "LinearAdapters") for site in sites}
        parts = {s: LinearAdapter(layer.out_features, rank, scale=scale, drop=drop) for s, layer in layers.items()}
        super().__init__(model, parts)
        self.biased = {site for site, layer in layers.items() if layer.bias is not None}

    def changes(self, factor: float = 1.0) -> dict[str, Change]:
        """See `Update.changes`: (I + factor s F) W, and the same of the bias."""

        def change(part: LinearAdapter) -> Change:
            def changed(original: Tensor) -> Tensor:
                matrix = (factor * part.matrix().detach()).to(original)  # (W, W)
                return original + matrix @ original

            return changed

        out = {}
        for site in self.sites:
            out[f"{site}.weight"] = change(self.at(site))
            if site in self.biased:
                out[f"{site}.bias"] = change(self.at(site))
        return out


class LinearAdapter(nn.Module):
    """(B, ..., W) -> (B, ..., W): rows + scale * F rows, with F = U D of `rank`, or a full matrix for None.

    scale: the start of a learned factor. drop: in training, the probability that an example goes past the adapter;
    for the others F counts 1 / (1 - drop) times (stochastic depth).
    """

    def __init__(self, width: int, rank: int | None = None, *, scale: float = 1.0, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        if rank is None or rank >= width:
            self.full = nn.Parameter(torch.zeros(width, width))
        else:
            self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, width)))
            self.up = nn.Parameter(torch.zeros(width, rank))

    def matrix(self) -> Tensor:
        """scale * F: (W, W)."""
        return self.scale * (self.full if hasattr(self, "full") else self.up @ self.down)

    def forward(self, rows: Tensor) -> Tensor:
        change = rows @ self.full.T if hasattr(self, "full") else rows @ self.down.T @ self.up.T  # (B, ..., W)
        factor: Tensor = self.scale
        if self.training and self.drop:
            kept = torch.rand(rows.shape[0], *[1] * (rows.ndim - 1), device=rows.device) >= self.drop
            factor = factor * kept / (1 - self.drop)  # (B, 1, ...)
        return rows + factor * change
