"""One tower of a model: its blocks, its parts by role, and what changes it for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from clipadapt.backbones.families import TowerParts, submodule
from clipadapt.backbones.insertion import PromptedRows
from clipadapt.errors import BackboneError, unknown_name

KINDS = ("q", "k", "v", "o", "fc1", "fc2")


class Tower:
    """The blocks and parts of one tower inside `model`.

    model     the module that holds the tower; set again where another module takes its place
    name      "text", "vision", ...
    parts     where its parts are, as dotted names
    prompted  the tokens inserted at the moment, None where there are none
    lasting   what changes the tower at the moment, by the name of the method of `Model` that began it
    """

    def __init__(self, model: nn.Module, name: str, parts: TowerParts) -> None:
        self.model: Any = model
        self.name, self.parts = name, parts
        self.prompted: PromptedRows | None = None
        self.lasting: list[str] = []

    def on(self, model: nn.Module) -> Self:
        """The same tower of a copy of the model."""
        other = copy.copy(self)
        other.model, other.prompted, other.lasting = model, None, []
        return other

    # -- parts ------------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        return self.part("blocks")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def config(self) -> Any:
        """The tower's part of the model's configuration."""
        return getattr(self.model.config, self.parts.config)

    @property
    def width(self) -> int:
        """Length of a hidden row."""
        return self.config.hidden_size

    def part(self, role: str) -> Any:
        """The module with a role such as "embeddings" or "norm" (see `TowerParts`)."""
        return submodule(self.model, getattr(self.parts, role))

    def attention(self, layer: int) -> Any:
        """The attention module of a block."""
        return self.blocks[layer].get_submodule(self.parts.attention)

    def layer_numbers(self, layers: Sequence[int] | None) -> list[int]:
        """Numbers of blocks, negative ones counted from the end; all blocks for None."""
        depth = len(self.blocks)
        if layers is None:
            return list(range(depth))
        for layer in layers:
            if not -depth <= layer < depth:
                raise BackboneError(f"Layer {layer} is outside the {depth} blocks of the {self.name} tower.")
        return [layer % depth for layer in layers]

    def target_modules(self, kinds: Sequence[str], layers: Sequence[int] | None) -> list[str]:
        """Full names of the linear layers of some kinds (see `KINDS`) in some blocks."""
        for kind in kinds:
            if kind not in KINDS:
                raise unknown_name("kind of linear layer", kind, KINDS)
        blocks = [f"{self.parts.blocks}.{layer}" for layer in self.layer_numbers(layers)]
        return [f"{block}.{getattr(self.parts, kind)}" for block in blocks for kind in kinds]

    def layer_norms(self) -> list[str]:
        """Full names of the weights and biases of all layer norms, in the blocks and outside."""
        root = self.parts.blocks.split(".", maxsplit=1)[0]
        names = []
        for name, module in submodule(self.model, root).named_modules():
            if isinstance(module, nn.LayerNorm):
                names += [f"{root}.{name}.{key}" for key, value in module.named_parameters() if value is not None]
        return names

    # -- running ----------------------------------------------------------------------------------------------------

    @contextmanager
    def changed_by(self, what: str) -> Iterator[None]:
        """Note that something changes the tower while the body runs."""
        self.lasting.append(what)
        try:
            yield
        finally:
            self.lasting.remove(what)

    def resume(self, hidden: Tensor, layer: int) -> Tensor:
        """Hidden states (B, L, W) that enter block `layer`, such as `after_blocks` shows behind the one before ->
        those (B, L, W) that leave the last block. Rows of a text tower must hold no padding that others attend to.
        """
        if self.prompted is not None:
            raise BackboneError(f"The {self.name} tower cannot resume while tokens are inserted into it.")
        (first,) = self.layer_numbers([layer])
        for block in list(self.blocks)[first:]:
            hidden = block(hidden, None, **self._of_blocks())
        return hidden

    def _of_blocks(self) -> dict[str, Any]:
        """What the tower tells each of its blocks."""
        return {}


def unit(features: Tensor, normalize: bool) -> Tensor:
    """Features (..., D) of unit length, or as they are."""
    return nn.functional.normalize(features, dim=-1) if normalize else features
