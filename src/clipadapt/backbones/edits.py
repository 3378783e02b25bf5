"""Lasting changes of a model's structure, each made by `Model.edited` on a copy that shares all other weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clipadapt.backbones.attention import attention_pairs, set_way
from clipadapt.backbones.families import TowerParts
from clipadapt.backbones.text_tower import TextTower
from clipadapt.backbones.tower import Tower
from clipadapt.errors import BackboneError


class Edit(ABC):
    """One change of one tower.

    tower  the name of the tower
    plain  whether weights and configuration alone tell of it: then the model is saved, loaded and identified like any
           other; else the edit counts in the fingerprint itself, and a model that has it is not saved
    """

    tower: str
    plain: ClassVar[bool] = False

    @abstractmethod
    def apply(self, tower: Tower) -> None:
        """Change the tower in place."""

    def digest(self) -> bytes:
        """What it adds to the fingerprint."""
        return repr(self).encode()


# -- the shape of the inputs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongerPositions(Edit):
    """More positions in a causal text tower, as in Long-CLIP (arXiv 2403.15378): texts of up to `length` tokens.

    The first `keep` rows of the table stay, the others are stretched by linear interpolation, and behind the last one
    its difference to the one before is continued. Texts of at most `keep` tokens keep their features to the bit.

    length  of the new table, greater than that of the old one (Long-CLIP: 248 instead of 77)
    keep    rows that stay (Long-CLIP: 20); at least two must be left to stretch
    """

    length: int
    keep: int = 20
    tower: str = "text"
    plain = True

    def apply(self, tower: Tower) -> None:
        if not isinstance(tower, TextTower) or tower.padding != "causal":
            raise BackboneError("LongerPositions is for text towers that are causal, such as CLIP's.")
        table = tower.part("positions").weight.detach()  # (n, W)
        if self.length <= len(table) or not 0 <= self.keep <= len(table) - 2:
            raise BackboneError(
                f"LongerPositions needs a length above {len(table)} and keep from 0 to {len(table) - 2}, "
                f"but got length {self.length} and keep {self.keep}."
            )
        embeddings, name = tower.part("embeddings"), tower.parts.positions.rpartition(".")[2]
        setattr(embeddings, name, nn.Embedding.from_pretrained(stretched(table, self.length, self.keep), freeze=True))
        embeddings.position_ids = torch.arange(self.length, device=table.device)[None]
        tower.config.max_position_embeddings = self.length
        if hasattr(tower.tokenizer, "model_max_length"):
            tower.tokenizer = copy.deepcopy(tower.tokenizer)
            tower.tokenizer.model_max_length = self.length


def stretched(table: Tensor, length: int, keep: int) -> Tensor:
    """A table of positions (n, W) -> (length, W), see `LongerPositions`."""
    old = len(table)
    # in whole numbers, so that a row that falls on an old one is that one
    along = torch.arange(length - keep, device=table.device) * (old - keep)
    below = (along // (length - keep)).clamp(max=old - keep - 2) + keep  # (length - keep,)
    share = ((along - (below - keep) * (length - keep)) / (length - keep))[:, None].to(
        table.dtype
    )  # above 1 at the end
    rest = table[below] + share * (table[below + 1] - table[below])
    return torch.cat([table[:keep], rest])


@dataclass(frozen=True)
class ExtraChannels(Edit):
    """Channels of the pixels next to red, green and blue, as in Alpha-CLIP (arXiv 2312.03818), with weights of zero.

    The tower takes (B, 3 + count, H, W); pixels with three channels get `fill` in the others.

    count  how many
    fill   their value where pixels lack them: what stands for "the whole image" (Alpha-CLIP: (1 - 0.5) / 0.26)
    """

    count: int = 1
    fill: float = 0.0
    tower: str = "vision"
    plain = True

    def apply(self, tower: Tower) -> None:
        if self.count < 1:
            raise BackboneError(f"ExtraChannels needs at least one channel, but got {self.count}.")
        new: Any = copy.deepcopy(tower.part("pixels"))
        before, channels = tower.config.num_channels, tower.config.num_channels + self.count
        weight = new.weight.detach()
        if isinstance(new, nn.Conv2d):  # (W, C, P, P)
            new.in_channels = channels
            weight = torch.cat([weight, weight.new_zeros(len(weight), self.count, *weight.shape[2:])], 1)
        else:  # (W, P * P * C), the channels innermost
            new.in_features = new.in_features // before * channels
            weight = nn.functional.pad(weight.unflatten(1, (-1, before)), (0, self.count)).flatten(1)
        new.weight = nn.Parameter(weight, requires_grad=False)
        tower.model.set_submodule(tower.parts.pixels, new)
        tower.config.num_channels, tower.config.extra_channels_fill = channels, self.fill


# -- how blocks compute -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionMode(Edit):
    """Chosen blocks attend in another way for good; the arguments are those of `Model.attention`.

    `Model.attention`, while it lasts, takes the place of it.
    """

    mode: str
    layers: Sequence[int] | None = (-1,)
    tower: str = "vision"

    def apply(self, tower: Tower) -> None:
        attention_pairs(self.mode)
        for layer in tower.layer_numbers(self.layers):
            set_way(tower.attention(layer), self.mode, layer)


@dataclass(frozen=True)
class DropResidual(Edit):
    """Chosen blocks without the residual around their attention: its output alone goes on (ClearCLIP, 2407.12442)."""

    layers: Sequence[int] | None = (-1,)
    tower: str = "vision"

    def apply(self, tower: Tower) -> None:
        _reduce(tower, self.layers, residual=False)


@dataclass(frozen=True)
class DropMLP(Edit):
    """Chosen blocks without their MLP: what leaves the attention leaves the block (ClearCLIP, 2407.12442)."""

    layers: Sequence[int] | None = (-1,)
    tower: str = "vision"

    def apply(self, tower: Tower) -> None:
        _reduce(tower, self.layers, mlp=False)


class ReducedBlock(nn.Module):
    """A pre-norm block that lacks its first residual, its MLP, or both; its weights keep their names."""

    def __init__(self, block: nn.Module, parts: TowerParts, *, residual: bool, mlp: bool) -> None:
        super().__init__()
        self._modules.update(block._modules)
        self.parts, self.has_residual, self.has_mlp = parts, residual, mlp

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        part = self.get_submodule
        normed = part(self.parts.norm1)(hidden_states)
        attended, _ = part(self.parts.attention)(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        hidden = hidden_states + attended if self.has_residual else attended
        return hidden + part(self.parts.mlp)(part(self.parts.norm2)(hidden)) if self.has_mlp else hidden


def _reduce(tower: Tower, layers: Sequence[int] | None, *, residual: bool = True, mlp: bool = True) -> None:
    for layer in tower.layer_numbers(layers):
        block: Any = tower.blocks[layer]
        if isinstance(block, ReducedBlock):
            residual, mlp = residual and block.has_residual, mlp and block.has_mlp
        elif not hasattr(block, tower.parts.norm1):
            raise BackboneError(
                f"Parts can be dropped from blocks that normalise first; those of this {tower.name} tower do not."
            )
        tower.blocks[layer] = ReducedBlock(block, tower.parts, residual=residual, mlp=mlp)


# -- modules behind sites ---------------------------------------------------------------------------------------------

BEHIND = "behind"  # the name of an inserted module inside its site


@dataclass(frozen=True, eq=False)
class InsertedModules(Edit):
    """Modules behind named modules of a tower, such as its linear layers: each gets what its site gives.

    modules  {full name of the site: module (..., W) -> (..., W)}; copies of them become part of the model, where their
             tensors are weights called "SITE.behind.NAME". One module at several sites stays one.
    """

    modules: Mapping[str, nn.Module] = field(repr=False)
    tower: str = "vision"

    def apply(self, tower: Tower) -> None:
        root = tower.parts.blocks.split(".", maxsplit=1)[0] + "."
        for site, module in copy.deepcopy(dict(self.modules)).items():
            try:
                owner = tower.model.get_submodule(site)
            except AttributeError:
                owner = None
            if owner is None or not site.startswith(root):
                raise BackboneError(f"The {tower.name} tower has no module called {site!r} to insert another behind.")
            if BEHIND in owner._modules:
                raise BackboneError(f"There is already a module behind {site!r}.")
            owner.add_module(BEHIND, module.to(tower.device))
            owner.register_forward_hook(_behind)

    def digest(self) -> bytes:
        """Where they are and what they are; their weights count with those of the model."""
        kinds = [f"{site}: {type(module).__qualname__} {module}" for site, module in sorted(self.modules.items())]
        return repr(["InsertedModules", *kinds]).encode()


def _behind(site: nn.Module, inputs: Any, output: Any) -> Any:
    return site.get_submodule(BEHIND)(output)
