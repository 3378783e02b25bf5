"""Adapters: small trainable modules behind named sub-modules of a frozen model, attached by hooks.

    bottleneck        y + up(gelu(down(y)))        y (..., W) what the site gives; up = 0 at the start
    linear adapter    y + s F y                    F (W, W), or U D of rank r; merges into the linear layer before it

The bottleneck is that of Houlsby et al. (arXiv 1902.00751) in the form of VL-Adapter (arXiv 2112.06825, official
ylsung/VL_adapter: the tanh form of GELU, biases, no norm); the linear adapter that of R-Adapter (arXiv 2408.05749).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from clipadapt.errors import ClipadaptError, unknown_name

SHARING = ("none", "down", "up", "all")  # which halves of bottlenecks are one and the same module


class Adapters(nn.Module):
    """One adapter for each named site of a model; an adapter may stand at several sites, and is then trained as one.

    `state_dict` holds the adapters' own tensors only. The model is never changed: what a site gives goes through its
    adapter while `attached` lasts. A site gives a tensor, or a tuple whose first part is changed.

        adapters = bottlenecks(backbone.model, backbone.target_modules(kinds=("o", "fc2")), reduction=8)
        with adapters.attached(backbone.model):
            backbone.encode_images(pixels)
    """

    def __init__(self, sites: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not sites:
            raise ClipadaptError("Adapters need at least one site.")
        self.parts = nn.ModuleList(dict.fromkeys(sites.values()))
        place = {part: i for i, part in enumerate(self.parts)}
        self.sites = {name: place[part] for name, part in sites.items()}

    def at(self, site: str) -> Any:
        """The adapter that stands at `site`."""
        return self.parts[self.sites[site]]

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """While it lasts, what each site of `model` gives goes through its adapter; afterwards nothing remains."""
        modules = {name: site_of(model, name) for name in self.sites}
        handles = [module.register_forward_hook(_through(self.at(name))) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _through(adapter: nn.Module) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

    return hook


def site_of(model: nn.Module, name: str) -> Any:
    """The sub-module of that name; ClipadaptError where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ClipadaptError(f"The model has no module called {name!r} to put an adapter behind.") from error


class Bottleneck(nn.Module):
    """(..., W) -> (..., W): rows + up(gelu(down(rows))). `down` and `up` may be layers that other adapters have too."""

    def __init__(self, width: int, rank: int, *, down: nn.Linear | None = None, up: nn.Linear | None = None) -> None:
        super().__init__()
        self.down = down if down is not None else nn.Linear(width, rank)
        self.up = up if up is not None else _zero(nn.Linear(rank, width))

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.up(gelu(self.down(rows), approximate="tanh"))


def bottlenecks(model: nn.Module, sites: Sequence[str], *, reduction: float = 8, share: str = "none") -> Adapters:
    """A bottleneck of W / `reduction` units (at least one) behind each of the named linear layers of `model`.

    share: what sites of one width have in common: "none", their "down" or "up" projection, or "all", one adapter. Such
    sites may lie in different layers and towers; sites of different widths share nothing.
    """
    if share not in SHARING:
        raise unknown_name("share", share, SHARING)
    first: dict[int, Bottleneck] = {}  # by width
    made: dict[str, nn.Module] = {}
    for site in sites:
        width = site_of(model, site).out_features
        one = first.get(width)
        if one is not None and share == "all":
            made[site] = one
            continue
        down = one.down if one is not None and share == "down" else None
        up = one.up if one is not None and share == "up" else None
        made[site] = Bottleneck(width, max(1, round(width / reduction)), down=down, up=up)
        first.setdefault(width, made[site])  # type: ignore[arg-type]
    return Adapters(made)


def for_another_task(adapters: Adapters, share: str = "all") -> Adapters:
    """Bottlenecks at the same sites for another task, which have the `share` part (see `SHARING`) in common.

    With "all" it is `adapters` itself. What is not shared starts anew, and is shared between sites as it was.
    """
    if share not in SHARING:
        raise unknown_name("share", share, SHARING)
    if share == "all":
        return adapters
    parts: dict[nn.Module, Any] = {}

    def fresh(layer: nn.Linear, zero: bool) -> nn.Linear:
        if layer not in parts:
            new = nn.Linear(layer.in_features, layer.out_features)
            parts[layer] = _zero(new) if zero else new
        return parts[layer]

    for old in adapters.parts:
        down: Any = old.down if share == "down" else fresh(old.down, zero=False)  # type: ignore[arg-type]
        up: Any = old.up if share == "up" else fresh(old.up, zero=True)  # type: ignore[arg-type]
        parts[old] = Bottleneck(down.in_features, down.out_features, down=down, up=up)
    return Adapters({site: parts[adapters.at(site)] for site in adapters.sites})


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


def merged(model: nn.Module, adapters: Adapters, factor: float = 1.0) -> dict[str, Tensor]:
    """Weights of `model`, by name, with the linear adapters taken into the linear layers that they stand behind.

    W' = (I + f s F) W and b' = (I + f s F) b, with f = `factor`: 0 leaves the layers as they are, 1 is the model with
    the adapters attached (in evaluation), between lies the straight line.
    """
    out = {}
    for site in adapters.sites:
        layer, matrix = site_of(model, site), factor * adapters.at(site).matrix().detach()
        matrix = matrix.to(layer.weight)
        out[f"{site}.weight"] = layer.weight.detach() + matrix @ layer.weight.detach()
        if layer.bias is not None:
            out[f"{site}.bias"] = layer.bias.detach() + matrix @ layer.bias.detach()
    return out


def learned(adapters: Adapters) -> dict[str, Tensor]:
    """Copies on the CPU of all trained tensors, each once however often it is shared, by name."""
    return {name: p.detach().cpu().clone() for name, p in adapters.named_parameters()}


@torch.no_grad()
def put_back(adapters: Adapters, tensors: Mapping[str, Tensor]) -> Adapters:
    """Write what `learned` gave into adapters of the same form, and freeze them; returns them, in evaluation mode."""
    for name, parameter in adapters.named_parameters():
        parameter.copy_(tensors[name])
    return adapters.requires_grad_(False).eval()


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
