"""Low-rank pairs of the library peft, which ours are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import peft
from torch import Tensor, nn


def inject(model: nn.Module, sites: Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> dict[str, Tensor]:
    """Put peft's trainable pairs into the named linear layers, in place, scaled by alpha / sqrt(rank).

    They are given as "SITE.A" (r, in) and "SITE.B" (out, r). Dropout is on until the layers are put in evaluation mode.
    """
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=True, lora_dropout=dropout, target_modules=list(sites)
    )
    peft.inject_adapter_in_model(config, model)
    layers = {site: model.get_submodule(site) for site in sites}
    for layer in layers.values():
        layer.lora_dropout.train()
    pairs = {}
    for site, layer in layers.items():
        pairs[f"{site}.A"], pairs[f"{site}.B"] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return pairs


def merged(weights: dict[str, Tensor], pairs: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights W + scaling B A of the pairs' layers, by name."""
    sites = [name.removesuffix(".A") for name in pairs if name.endswith(".A")]
    return {f"{s}.weight": weights[f"{s}.weight"] + scaling * (pairs[f"{s}.B"] @ pairs[f"{s}.A"]) for s in sites}
