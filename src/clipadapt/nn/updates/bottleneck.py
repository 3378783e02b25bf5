"""Bottleneck adapters behind linear layers; several sites and several tasks can share them.

    y + up(gelu(down(y)))        y (..., W) what the site gives; up = 0 at the start

That of Houlsby et al. (arXiv 1902.00751) in the form of VL-Adapter (arXiv 2112.06825, official ylsung/VL_adapter: the
tanh form of GELU, biases, no norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.functional import gelu

from clipadapt.errors import unknown_name
from clipadapt.nn.updates.sites import SiteUpdate, linear_site

SHARING = ("none", "down", "up", "all")  # which halves of bottlenecks are one and the same module


class Bottlenecks(SiteUpdate):
    """A bottleneck of W / `reduction` units (at least one) behind each of the named linear layers; not mergeable.

    Args:
        model: Whose layers they are.
        sites: Names of linear layers.
        reduction: Width of the rows / width of the bottleneck.
        share: What sites of one width have in common: "none", their "down" or "up" projection, or "all", one adapter.
            Such sites may be in different layers and towers; sites of different widths share nothing.

    New adapters draw from torch's global stream. Saved as "parts.I.down.weight" and so on, numbered in the order of
    `sites`, a shared projection with the first adapter that has it.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str], *, reduction: float = 8, share: str = "none") -> None:
        if share not in SHARING:
            raise unknown_name("share", share, SHARING)
        first: dict[int, Bottleneck] = {}  # by width
        parts: dict[str, nn.Module] = {}
        for site in sites:
            width = linear_site(model, site, "Bottlenecks").out_features
            one = first.get(width)
            if one is not None and share == "all":
                parts[site] = one
                continue
            down = one.down if one is not None and share == "down" else None
            up = one.up if one is not None and share == "up" else None
            made = Bottleneck(width, max(1, round(width / reduction)), down=down, up=up)
            parts[site] = made
            first.setdefault(width, made)
        super().__init__(model, parts)

    def for_another_task(self, share: str = "all") -> Self:
        """Bottlenecks at the same sites for another task, which have the `share` part (see `SHARING`) in common.

        With "all" it is this update itself. What is not shared starts fresh, and is shared between sites as it was.
        """
        if share not in SHARING:
            raise unknown_name("share", share, SHARING)
        if share == "all":
            return self
        fresh: dict[nn.Module, Any] = {}

        def layer(old: nn.Linear, zero: bool) -> nn.Linear:
            if old not in fresh:
                new = nn.Linear(old.in_features, old.out_features)
                fresh[old] = (_zero(new) if zero else new).to(old.weight.device)
            return fresh[old]

        parts: dict[nn.Module, Bottleneck] = {}
        for old in self.parts:
            assert isinstance(old, Bottleneck)
            down = old.down if share == "down" else layer(old.down, zero=False)
            up = old.up if share == "up" else layer(old.up, zero=True)
            parts[old] = Bottleneck(down.in_features, down.out_features, down=down, up=up)
        other = type(self).__new__(type(self))
        SiteUpdate.__init__(other, self, {site: parts[self.at(site)] for site in self.sites})
        return other


class Bottleneck(nn.Module):
    """(..., W) -> (..., W): rows + up(gelu(down(rows))). `down` and `up` may be layers that other adapters have too."""

    def __init__(self, width: int, rank: int, *, down: nn.Linear | None = None, up: nn.Linear | None = None) -> None:
        super().__init__()
        self.down = down if down is not None else nn.Linear(width, rank)
        self.up = up if up is not None else _zero(nn.Linear(rank, width))

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.up(gelu(self.down(rows), approximate="tanh"))


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
