"""Temporary changes to a tower that leave its weights alone: tokens put in at any layer, and rows between its blocks
read or changed.

All go through hooks that transformers' own forward honours, so no model code is repeated here; they are context
managers, and nothing of them remains afterwards, whether the body ended well or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from clipadapt.backbones.insertion import Insertion, PromptedRows
from clipadapt.backbones.tower import Tower
from clipadapt.errors import BackboneError


def check_insertion(tower: Tower, insertion: Insertion) -> None:
    """Raise BackboneError where prompt tokens do not fit a tower's width, depth or number of blocks."""
    width, depth = tower.width, len(tower.blocks)
    if insertion.tokens.ndim not in (2, 3) or insertion.tokens.shape[-1] != width:
        shape = tuple(insertion.tokens.shape)
        raise BackboneError(
            f"Tokens of the {tower.name} tower must be (n, {width}) or (B, n, {width}), but are {shape}."
        )
    if insertion.layer != "input" and not 0 <= insertion.layer < depth:
        raise BackboneError(f'Insertion layer must be "input" or 0..{depth - 1}, but is {insertion.layer!r}.')
    if insertion.mode not in ("replace", "insert"):
        raise BackboneError(f'Insertion mode must be "replace" or "insert", but is {insertion.mode!r}.')
    if isinstance(insertion.at, torch.Tensor) and insertion.mode == "insert":
        raise BackboneError("Tokens are inserted at one row; a tensor of rows is for replacing.")
    if tower.name == "text" and isinstance(insertion.at, int) and insertion.at < 0:
        raise BackboneError("Rows of texts are counted from the start, since their end depends on the padding.")


@contextmanager
def inserted_tokens(tower: Tower, insertions: Sequence[Insertion]) -> Iterator[None]:
    """See `Backbone.inserted`."""
    for insertion in insertions:
        check_insertion(tower, insertion)
    blocks = tower.blocks
    if tower.prompted is not None:
        raise BackboneError(f"Tokens are already inserted into the {tower.name} tower; put all into one `inserted`.")
    at_input = [i for i in insertions if i.layer == "input"]
    as_words = [i for i in at_input if tower.name == "text" and i.mode == "replace"]
    as_rows = [i for i in at_input if i not in as_words]
    state = PromptedRows()

    def on_words(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return PromptedRows().put_in(output, as_words)

    def on_embeddings(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        state.added = []
        return state.put_in(output, as_rows)

    def before_block(number: int) -> Any:
        here = [i for i in insertions if i.layer == number]

        def before_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden = state.put_in(args[0], here)
            mask = args[1] if len(args) > 1 else None
            # a causal tower passes no mask at all (transformers sets is_causal), so only padding is met here
            if mask is not None and state.added:
                mask = state.lengthen(mask)
            return (hidden, mask, *args[2:]), kwargs

        return before_block

    def after_blocks(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return state.take_out(output)

    with ExitStack() as hooks:
        if as_words:
            hooks.enter_context(tower.part("tokens").register_forward_hook(on_words))
        hooks.enter_context(tower.part("embeddings").register_forward_hook(on_embeddings))
        for number, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_pre_hook(before_block(number), with_kwargs=True))
        hooks.enter_context(blocks[-1].register_forward_hook(after_blocks))
        hooks.enter_context(tower.changed_by("inserted"))
        tower.prompted = state
        hooks.callback(setattr, tower, "prompted", None)
        yield


# -- rows between blocks -----------------------------------------------------------------------------------------------


@contextmanager
def rows_after_blocks(
    tower: Tower, functions: Mapping[int, Callable[[torch.Tensor], torch.Tensor | None]]
) -> Iterator[None]:
    """See `Model.after_blocks`."""

    def through(layer: int, function: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        def after_block(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            rows = function(output)
            if rows is not None and rows.shape != output.shape:
                shapes = f"{tuple(output.shape)} became {tuple(rows.shape)}"
                raise BackboneError(f"Rows behind block {layer} must keep their shape, but {shapes}.")
            return output if rows is None else rows

        return after_block

    blocks = tower.blocks
    with ExitStack() as hooks:
        for layer, function in functions.items():
            (number,) = tower.layer_numbers([layer])
            # first among the hooks: `inserted` takes its rows out behind the last block
            hooks.enter_context(blocks[number].register_forward_hook(through(layer, function), prepend=True))
        hooks.enter_context(tower.changed_by("after_blocks"))
        yield
