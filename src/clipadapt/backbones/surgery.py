"""Changes to a running tower that leave its weights alone: tokens put in at any layer, rows between its blocks read
or changed, and other ways to attend.

All go through hooks and settings that transformers' own forward honours, so no model code is repeated here; both
are context managers, and nothing of them remains afterwards, whether the body ended well or not.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from clipadapt.backbones.families import TowerName, register_attention, submodule
from clipadapt.errors import BackboneError

if TYPE_CHECKING:
    from clipadapt.backbones.backbone import Backbone


# -- token insertion -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Insertion:
    """Tokens that take part in a tower's computation; gradients reach them.

    tokens  (n, W), the same for the whole batch, or (B, n, W), one set for each picture or text
    at      row of the first token in the sequence as it is afterwards, the others follow; in the vision tower it may
            be negative and then counts from the end. With "replace" also an int64 tensor of rows, (n,) or (B, n)
    layer   "input": the embeddings. A text row replaced there gets its position added like the word it stands for;
            an inserted row gets none, and a vision row passes the norm before the first block like all others.
            j >= 0: directly before block j, counted from 0
    mode    "replace" overwrites rows, "insert" puts new ones in between. Inserted rows lengthen the sequence until the
            last block, then leave it: pooling sees the rows it was trained on (`ImageTokens.inserted` has the rest)

    CoOp:      text=[Insertion(ctx, at=1)], where the token ids hold n placeholder words behind the start token
    CoCoOp:    the same with tokens (B * C, n, W) and the ids repeated for each picture
    VPT, deep: vision=[Insertion(p[0], at=-n, mode="insert")] + [Insertion(p[j], at=-n, layer=j) for j in 1, 2, ...]
    MaPLe:     VPT, and text=[Insertion(ctx, at=1)] + [Insertion(t[j], at=1, layer=j) for j in 1, 2, ...]
    MMRL:      [Insertion(r[0], at=1, layer=first, mode="insert")] + [Insertion(r[j], at=1, layer=first + j), ...]
    """

    tokens: torch.Tensor
    at: int | torch.Tensor = 1
    layer: int | Literal["input"] = "input"
    mode: Literal["replace", "insert"] = "replace"

    def rows(self, length: int, device: torch.device) -> torch.Tensor:
        """Row numbers the tokens take in a sequence that has `length` rows with them: (n,) or (B, n)."""
        count = self.tokens.shape[-2]
        if isinstance(self.at, torch.Tensor):
            rows = self.at.to(device)
            fits = rows.shape[-1] == count and int(rows.min()) >= 0 and int(rows.max()) < length
        else:
            first = self.first(length)
            rows = torch.arange(first, first + count, device=device)
            fits = 0 <= first <= length - count
        if not fits:
            raise BackboneError(f"{count} tokens at row {self.at} do not fit into a sequence of {length} rows.")
        return rows

    def first(self, length: int) -> int:
        """The row that `at`, a number, stands for: a plain one, which an exported graph can hold."""
        assert isinstance(self.at, int)
        return self.at if self.at >= 0 else length + self.at


def put_in(hidden: torch.Tensor, insertion: Insertion) -> tuple[torch.Tensor, slice | None]:
    """(B, L, W) -> the changed rows (B, L', W) and, of inserted ones, where they are."""
    batch, length, width = hidden.shape
    tokens = insertion.tokens.to(hidden.device, hidden.dtype)
    if tokens.ndim == 3 and tokens.shape[0] != batch:
        raise BackboneError(f"Tokens for a batch of {tokens.shape[0]} were put into a batch of {batch}.")
    tokens = tokens.expand(batch, -1, -1)  # (B, n, W)
    if insertion.mode == "replace":
        rows = insertion.rows(length, hidden.device).expand(batch, -1)  # (B, n)
        return hidden.scatter(1, rows[..., None].expand(-1, -1, width), tokens), None
    insertion.rows(length + tokens.shape[1], hidden.device)  # refuses what does not fit
    start = insertion.first(length + tokens.shape[1])
    return torch.cat([hidden[:, :start], tokens, hidden[:, start:]], 1), slice(start, start + tokens.shape[1])


def check_insertion(backbone: Backbone, tower: TowerName, insertion: Insertion) -> None:
    width, depth = backbone.width(tower), len(backbone.blocks(tower))
    if insertion.tokens.ndim not in (2, 3) or insertion.tokens.shape[-1] != width:
        shape = tuple(insertion.tokens.shape)
        raise BackboneError(f"Tokens of the {tower} tower must be (n, {width}) or (B, n, {width}), but are {shape}.")
    if insertion.layer != "input" and not 0 <= insertion.layer < depth:
        raise BackboneError(f'Insertion layer must be "input" or 0..{depth - 1}, but is {insertion.layer!r}.')
    if insertion.mode not in ("replace", "insert"):
        raise BackboneError(f'Insertion mode must be "replace" or "insert", but is {insertion.mode!r}.')
    if isinstance(insertion.at, torch.Tensor) and insertion.mode == "insert":
        raise BackboneError("Tokens are inserted at one row; a tensor of rows is for replacing.")
    if tower == "text" and isinstance(insertion.at, int) and insertion.at < 0:
        raise BackboneError("Rows of texts are counted from the start, since their end depends on the padding.")


class PromptedRows:
    """Keeps, during one pass through a tower, the places of inserted rows.

    taken  (B, n, W) the inserted rows as they left the last block
    """

    def __init__(self) -> None:
        self.added: list[bool] = []  # per row of the sequence; empty where nothing was inserted
        self.taken: torch.Tensor | None = None

    def put_in(self, hidden: torch.Tensor, insertions: Sequence[Insertion]) -> torch.Tensor:
        for insertion in insertions:
            length = hidden.shape[1]
            hidden, place = put_in(hidden, insertion)
            if place is not None:
                self.added = self.added or [False] * length
                self.added[place.start : place.start] = [True] * (place.stop - place.start)
        return hidden

    def lengthen(self, mask: torch.Tensor) -> torch.Tensor:
        """A padding mask over keys (B, 1, L, L) with the inserted rows visible to all: (B, 1, L', L')."""
        keys = mask[:, :, :1].new_ones(*mask.shape[:2], 1, len(self.added))  # boolean: True may be attended to
        keys[..., [i for i, added in enumerate(self.added) if not added]] = mask[:, :, :1]
        return keys.expand(-1, -1, len(self.added), -1)

    def take_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, L', W) -> the rows that were there before (B, L, W); the inserted ones are kept in `taken`."""
        added = torch.tensor(self.added or [False] * hidden.shape[1], device=hidden.device)
        self.taken = hidden[:, added]
        return hidden[:, ~added]


@contextmanager
def inserted_tokens(backbone: Backbone, tower: TowerName, insertions: Sequence[Insertion]) -> Iterator[None]:
    """See `Backbone.inserted`."""
    for insertion in insertions:
        check_insertion(backbone, tower, insertion)
    blocks, parts = backbone.blocks(tower), backbone.tower(tower)
    if tower in backbone.prompted:
        raise BackboneError(f"Tokens are already inserted into the {tower} tower; put all into one `inserted`.")
    at_input = [i for i in insertions if i.layer == "input"]
    as_words = [i for i in at_input if tower == "text" and i.mode == "replace"]
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
            hooks.enter_context(submodule(backbone.model, parts.tokens).register_forward_hook(on_words))
        hooks.enter_context(submodule(backbone.model, parts.embeddings).register_forward_hook(on_embeddings))
        for number, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_pre_hook(before_block(number), with_kwargs=True))
        hooks.enter_context(blocks[-1].register_forward_hook(after_blocks))
        backbone.prompted[tower] = state
        hooks.callback(backbone.prompted.pop, tower)
        yield


# -- rows between blocks -----------------------------------------------------------------------------------------------


@contextmanager
def rows_after_blocks(
    backbone: Backbone, tower: TowerName, functions: Mapping[int, Callable[[torch.Tensor], torch.Tensor | None]]
) -> Iterator[None]:
    """See `Backbone.after_blocks`."""

    def through(layer: int, function: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        def after_block(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            rows = function(output)
            if rows is not None and rows.shape != output.shape:
                shapes = f"{tuple(output.shape)} became {tuple(rows.shape)}"
                raise BackboneError(f"Rows behind block {layer} must keep their shape, but {shapes}.")
            return output if rows is None else rows

        return after_block

    blocks = backbone.blocks(tower)
    with ExitStack() as hooks:
        for layer, function in functions.items():
            (number,) = backbone.layer_numbers(tower, [layer])
            # first among the hooks: `inserted` takes its rows out behind the last block
            hooks.enter_context(blocks[number].register_forward_hook(through(layer, function), prepend=True))
        backbone.watched.append(tower)
        hooks.callback(backbone.watched.remove, tower)
        yield


# -- attention -------------------------------------------------------------------------------------------------------

ATTENTION = "clipadapt"  # the name under which transformers finds `_attend`


@dataclass(eq=False)
class _Way:
    """How one block attends; travels in the block's own copy of the configuration."""

    pairs: tuple[tuple[str, str], ...]  # (("q", "k"),), ... ; empty: every row sees itself only
    bias: torch.Tensor | None
    maps: dict[int, torch.Tensor]
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
    way.maps[way.layer] = weights
    dropped = nn.functional.dropout(weights, dropout, module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights


register_attention(ATTENTION, _attend)


def _pairs(mode: str) -> tuple[tuple[str, str], ...]:
    if mode == "identity":
        return ()
    pairs = [re.fullmatch("([qkv])([qkv])", pair) for pair in mode.split("+")]
    if None in pairs:
        raise BackboneError(
            f'Unknown attention mode {mode!r}; use pairs of q, k and v such as "vv" or "qq+kk", or "identity".'
        )
    return tuple((pair[1], pair[2]) for pair in pairs if pair)


@contextmanager
def changed_attention(
    backbone: Backbone, tower: TowerName, layers: Sequence[int], mode: str, bias: torch.Tensor | None
) -> Iterator[dict[int, torch.Tensor]]:
    """See `Backbone.attention`. Only the blocks' configurations are exchanged, so the tower masks as before."""
    pairs = _pairs(mode)
    maps: dict[int, torch.Tensor] = {}
    before: list[tuple[Any, Any]] = []
    try:
        for layer in layers:
            module: Any = backbone.blocks(tower)[layer].get_submodule(backbone.tower(tower).attention)
            before.append((module, module.config))
            config = copy.copy(module.config)
            config._attn_implementation = ATTENTION
            config.attention_way = _Way(pairs, bias, maps, layer)
            module.config = config
        yield maps
    finally:
        for module, config in before:
            module.config = config
