"""Low-rank updates of linear layers (LoRA).

    y + scaling B A drop(x)        x (..., in) what the layer reads, y (..., out) what it gives; B = 0 at the start
    W' = W + scaling B A           A (r, in), B (out, r)

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). Start values, dropout and the order
of operations are those of the library peft, number for number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear

from clipadapt.errors import ClipadaptError
from clipadapt.nn.updates.sites import SiteUpdate, linear_site
from clipadapt.nn.updates.update import Change


class LowRank(SiteUpdate):
    """A low-rank pair for each of the named linear layers.

    Args:
        model: Whose layers they are.
        sites: Names of linear layers.
        rank: r, at least 1.
        scaling: Factor of B A, such as alpha / r (LoRA) or alpha / sqrt(r) (rsLoRA, CLIP-LoRA).
        dropout: In training, of what A reads; in [0, 1).

    New pairs draw from torch's global stream, in the order of the model's layers. Saved as "SITE.A" and "SITE.B".
    """

    mergeable: ClassVar[bool] = True
    cheap: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, sites: Sequence[str], rank: int, scaling: float = 1.0, dropout: float = 0.0
    ) -> None:
        if rank < 1:
            raise ClipadaptError(f"The rank of a LowRank must be at least 1, not {rank}.")
        layers = {site: linear_site(model, site, "LowRank") for site in sites}
        drawn = {
            name: LowRankPair(layers[name].in_features, layers[name].out_features, rank, dropout)
            for name, _ in model.named_modules()
            if name in layers
        }
        super().__init__(model, {site: drawn[site] for site in layers})
        self.scaling = scaling
        self._site_names = list(self.sites)

    def _output(self, part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + part(inputs[0]) * self.scaling

    def changes(self, factor: float = 1.0) -> dict[str, Change]:
        """See `Update.changes`: W + factor scaling B A."""
        scale = factor * self.scaling

        def change(a: Tensor, b: Tensor) -> Change:
            return lambda original: original + scale * (b @ a).to(original.device)

        pairs = {site: self.at(site) for site in self.sites}
        return {f"{site}.weight": change(pair.A.detach(), pair.B.detach()) for site, pair in pairs.items()}

    def _saved_name(self, key: str) -> str:
        _, number, leaf = key.split(".")
        return f"{self._site_names[int(number)]}.{leaf}"


class LowRankPair(nn.Module):
    """(..., in) -> (..., out): B A drop(rows), with A (r, in) drawn as a linear layer's weight and B (out, r) zero."""

    def __init__(self, width: int, out: int, rank: int, dropout: float = 0.0) -> None:
        super().__init__()
        down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)  # both draw, as peft's do
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        self.A, self.B = down.weight, up.weight
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: Tensor) -> Tensor:
        return linear(linear(self.dropout(rows), self.A), self.B)
