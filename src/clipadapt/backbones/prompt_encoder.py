"""Class prompts encoded again and again while their inserted tokens are learned, without what cannot change them.

C prompts share their first P rows (start token, context vectors) and differ in a short rest (name, period, end token).
In a causal tower no row sees a later one, so

* rows behind the end token are left out;
* the P shared rows pass through the tower once, and the other rows attend to their keys and values;
* those other rows of all prompts are packed into one matrix, (R, W) with R the sum of their lengths;
* the last block computes the pooled rows only, and its shared rows not at all.

The features and every gradient are those of the plain computation: the same sums in another order. Where sharing or
packing is not valid, `explain` says why, and the plain computation is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from clipadapt.backbones.attention import ATTENTION
from clipadapt.backbones.edits import ReducedBlock
from clipadapt.backbones.families import TowerParts
from clipadapt.backbones.insertion import Insertion, put_in
from clipadapt.backbones.surgery import check_insertion, inserted_tokens
from clipadapt.backbones.text_tower import TextTower
from clipadapt.errors import BackboneError

# Packed rows that pass through the tower together: few enough for a CPU's caches, enough for full-speed products.
CHUNK_ROWS = {"cpu": 1024, "cuda": 32768}


@dataclass(frozen=True, eq=False)
class _Packed:
    """The rests of C prompts behind P shared rows, one under the other, short ones first.

    order    (C,) which prompt each rest belongs to
    lengths  (C,) ascending, each at least 1
    ids      (R,) token ids
    rows     (R,) their rows in the unpacked sequence
    """

    order: Tensor
    lengths: list[int]
    ids: Tensor
    rows: Tensor

    def chunks(self, limit: int) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
        """Packed rows of whole prompts, about `limit` at a time, with their (count, length) runs of equal length."""
        start = size = 0
        runs: list[tuple[int, int]] = []
        for length in self.lengths:
            if size and size + length > limit:
                yield slice(start, start + size), runs
                start, size, runs = start + size, 0, []
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
            size += length
        if size:
            yield slice(start, start + size), runs


class PromptEncoder:
    """Encodes one set of prompts with ever new tokens in them; made by `Backbone.prompt_encoder`.

    Call it with insertions (see `Insertion`) whose `tokens` are

        (n, W)        the same for every prompt
        (C, n, W)     a set for each prompt
        (G, 1, n, W)  a set for each of G groups: images (CoCoOp) or prompts of an ensemble
        (G, C, n, W)  a set for each prompt of each group

    It returns (C, D), or (G, C, D) where there are groups; gradients reach the tokens.
    """

    def __init__(self, tower: TextTower, ids: Tensor, memory: int) -> None:
        self._tower, self._memory = tower, memory
        self.ids = ids.to(tower.device)  # (C, L)
        self._packs: dict[int, _Packed] = {}
        if tower.padding == "causal":
            self._ends = tower.end_positions(self.ids)  # (C,)
            self.ids = self.ids[:, : int(self._ends.max()) + 1]

    def __call__(self, insertions: Sequence[Insertion] = (), *, normalize: bool = True) -> Tensor:
        """Features (C, D) or (G, C, D) of the prompts with `insertions`, unit unless `normalize` is off."""
        for insertion in insertions:
            self._check(insertion)
        features = self._plain(insertions) if self._obstacle(insertions) else self._shared(insertions)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def explain(self, insertions: Sequence[Insertion] = ()) -> str:
        """In one sentence: how these prompts are computed, and what prevents more."""
        obstacle = self._obstacle(insertions)
        if obstacle:
            return f"plain: {obstacle}"
        shared = self._shared_rows(insertions)
        lengths = self._pack(shared).lengths
        text = (
            f"{shared} shared rows computed once, {len(lengths):,} packed rests of {lengths[0]} to {lengths[-1]} rows"
        )
        differing = [i for i in insertions if _per_prompt(i, self.ids.shape[0])]
        return f"{text}; tokens at layer {differing[0].layer} differ from prompt to prompt" if differing else text

    def _check(self, insertion: Insertion) -> None:
        tokens, classes = insertion.tokens, len(self.ids)
        flat = tokens.flatten(0, -3) if tokens.ndim > 3 else tokens
        check_insertion(self._tower, replace(insertion, tokens=flat))
        sets = {2: (), 3: (classes,), 4: (1, classes)}.get(tokens.ndim)
        if sets is None or (sets and tokens.shape[-3] not in sets):
            shapes = f"(n, W), ({classes}, n, W), (G, 1, n, W) or (G, {classes}, n, W)"
            raise BackboneError(f"Tokens for {classes} prompts must be {shapes}, but are {tuple(tokens.shape)}.")

    # -- which way --------------------------------------------------------------------------------------------------

    def _obstacle(self, insertions: Sequence[Insertion]) -> str | None:
        """Why rows cannot be shared, or None."""
        tower = self._tower
        if tower.padding != "causal":
            return f"in the text tower of {tower.family} every row sees the later ones"
        if tower.prompted is not None:
            return "tokens are already inserted into the text tower"
        if "after_blocks" in tower.lasting:
            return "rows of the text tower are read or changed between its blocks"
        for layer, block in enumerate(tower.blocks):
            if isinstance(block, ReducedBlock):
                return "blocks of the text tower lack a part"
            attention = tower.attention(layer)
            if attention.config._attn_implementation == ATTENTION:
                return "the text tower's attention is changed"
            if attention.training and attention.dropout:
                return "dropout draws other masks for each prompt"
            if any(isinstance(m, nn.Dropout) and m.training and m.p for m in block.modules()):
                return "dropout draws other masks for each prompt"
        for insertion in insertions:
            if insertion.mode == "insert" and _per_prompt(insertion, len(self.ids)):
                return "the rows put in between differ from prompt to prompt"
            if insertion.mode == "insert" and insertion.at > self._shared_rows(insertions):
                return "rows are put in behind the shared ones"
        return None

    def _shared_rows(self, insertions: Sequence[Insertion]) -> int:
        """P: how many first rows are the same in all prompts (of one group), at every layer."""
        length = self.ids.shape[1]
        common = (self.ids == self.ids[:1]).all(0)  # (L,)
        for insertion in insertions:
            if insertion.mode == "insert":
                continue
            rows = insertion.rows(length, self.ids.device).expand(len(self.ids), -1)  # (C, n)
            same = (rows == rows[:1]).all(0) & torch.tensor(not _per_prompt(insertion, len(self.ids)))
            if insertion.layer == "input":
                common[rows[0, same]] = True
            common[rows[:, ~same].flatten()] = False
        first_difference = int((~common).int().argmax()) if not common.all() else length
        return min(first_difference, int(self._ends.min()))

    def _pack(self, shared: int) -> _Packed:
        if shared not in self._packs:
            lengths = self._ends + 1 - shared  # (C,)
            order = lengths.argsort(stable=True)
            columns = torch.arange(shared, self.ids.shape[1], device=self.ids.device)
            inside = columns < shared + lengths[order, None]  # (C, L - P)
            rows = columns.expand(len(order), -1)[inside]
            ids = self.ids[order, shared:][inside]
            self._packs[shared] = _Packed(order, lengths[order].tolist(), ids, rows)
        return self._packs[shared]

    # -- plainly ----------------------------------------------------------------------------------------------------

    def _plain(self, insertions: Sequence[Insertion]) -> Tensor:
        groups, classes = _groups(insertions), len(self.ids)
        flat = [replace(i, tokens=_flat(i.tokens, groups, classes), at=_flat_rows(i.at, groups)) for i in insertions]
        with inserted_tokens(self._tower, flat) if flat else nullcontext():
            features = self._tower.encode(self.ids.repeat(groups or 1, 1), normalize=False)
        return features.unflatten(0, (groups, classes)) if groups else features

    # -- sharing ----------------------------------------------------------------------------------------------------

    def _shared(self, insertions: Sequence[Insertion]) -> Tensor:
        tower = self._tower
        groups = _groups(insertions)
        shared = self._shared_rows(insertions)
        packed = self._pack(shared)
        in_prefix, in_rest = self._divide(insertions, shared, packed)
        blocks = [_Block(tower.parts, block) for block in tower.blocks]
        positions = tower.part("positions").weight  # (L, W)

        prefix = tower.embed(self.ids[:1, :shared])  # (1, P, W)
        prefix = _put(prefix, [i for i in in_prefix if i.layer == "input" and i.mode == "replace"])
        prefix = prefix + positions[:shared]
        prefix = _put(prefix, [i for i in in_prefix if i.layer == "input" and i.mode == "insert"])
        seen: list[tuple[Tensor, Tensor]] = []  # per block the prefix's keys and values, (G or 1, heads, P, C)
        for number, block in enumerate(blocks):
            prefix = _put(prefix, [i for i in in_prefix if i.layer == number])
            query, key, value = block.attention_inputs(prefix)
            seen.append((key, value))
            if number < len(blocks) - 1:  # the last block's prefix rows reach nothing
                prefix = block.after_attention(prefix, scaled_dot_product_attention(query, key, value, is_causal=True))

        rest = (tower.embed(packed.ids))[None]  # (1, R, W)
        rest = _write(rest, in_rest.get("input", [])) + positions[packed.rows]
        budget = self._memory
        pooled = []
        for rows, runs in packed.chunks(self._chunk_rows(groups or 1)):
            run = _Chunk(blocks, runs, {k: _within(v, rows) for k, v in in_rest.items() if k != "input"})
            inputs = rest[:, rows] if len(rest) > 1 else rest[:, rows].expand(groups or 1, -1, -1)
            flat = [part for pair in seen for part in pair]
            budget -= run.bytes(inputs, flat[0].shape[2])
            if torch.is_grad_enabled() and budget < 0:
                pooled.append(checkpoint(run, inputs, *flat, use_reentrant=False, preserve_rng_state=False))
            else:
                pooled.append(run(inputs, *flat))
        ends = torch.cat(pooled, 1)[:, packed.order.argsort()]  # (G, C, W)
        features = tower.project(ends)  # (G, C, D)
        return features if groups else features[0]

    def _chunk_rows(self, groups: int) -> int:
        limit = CHUNK_ROWS.get(self.ids.device.type, 8192)
        return max(1, limit // groups)

    def _divide(
        self, insertions: Sequence[Insertion], shared: int, packed: _Packed
    ) -> tuple[list[Insertion], dict[Any, list[tuple[Tensor, Tensor]]]]:
        """What goes into the shared rows, and per layer (packed rows (m,), tokens (1 or G, m, W)) for the others."""
        in_prefix: list[Insertion] = []
        in_rest: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        classes, device = len(self.ids), self.ids.device
        place = torch.empty(classes, dtype=torch.int64, device=device)  # of each prompt, where its rest begins
        lengths = torch.tensor(packed.lengths, device=device)
        place[packed.order] = lengths.cumsum(0) - lengths
        for insertion in insertions:
            tokens = insertion.tokens.to(device)
            if insertion.mode == "insert":
                in_prefix.append(replace(insertion, tokens=_per_group(tokens)))
                continue
            rows = insertion.rows(self.ids.shape[1], device).expand(classes, -1)  # (C, n)
            inside = (rows < shared).all(0)  # (n,)
            if inside.any():
                in_prefix.append(
                    Insertion(_per_group(tokens)[:, inside], rows[0, inside], insertion.layer, insertion.mode)
                )
            if not inside.all():
                rows = rows[:, ~inside]
                alive = rows <= self._ends[:, None]  # tokens behind the end change nothing
                where = (place[:, None] + rows - shared)[alive]  # (m,)
                spread = tokens[..., ~inside, :]
                spread = spread.expand(classes, -1, -1) if spread.ndim == 2 else spread
                spread = spread.expand(*spread.shape[:-3], classes, -1, -1)
                spread = spread if spread.ndim == 4 else spread[None]
                in_rest.setdefault(insertion.layer, []).append((where, spread[:, alive]))
        return in_prefix, in_rest


class _Block:
    """One transformer block taken apart: what comes before its attention, and what after. Pre-norm, as in CLIP."""

    def __init__(self, parts: TowerParts, block: nn.Module) -> None:
        self.norm1, self.norm2 = block.get_submodule(parts.norm1), block.get_submodule(parts.norm2)
        self.q, self.k, self.v, self.o = (block.get_submodule(getattr(parts, kind)) for kind in "qkvo")
        self.mlp = block.get_submodule(parts.mlp)
        attention: Any = block.get_submodule(parts.attention)
        self.heads: int = attention.num_heads

    def heads_first(self, rows: Tensor) -> Tensor:
        """(G, N, W) -> (G, heads, N, C)"""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attention_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(G, N, W) -> query, key and value, each (G, heads, N, C)."""
        normed = self.norm1(hidden)
        return tuple(self.heads_first(linear(normed)) for linear in (self.q, self.k, self.v))  # type: ignore[return-value]

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Rows (G, N, W) and what they attended to (G, heads, N, C) -> the block's output (G, N, W)."""
        hidden = hidden + self.o(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norm2(hidden))


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Packed rests of some prompts on their way through all blocks."""

    blocks: list[_Block]
    runs: list[tuple[int, int]]  # (prompts, rows of each)
    later: dict[Any, list[tuple[Tensor, Tensor]]]  # per layer what is written over rows before it

    def __call__(self, hidden: Tensor, *seen: Tensor) -> Tensor:
        """Rests (G, R, W), and per block keys and values (1 or G, heads, P, C) -> their last rows (G, prompts, W)."""
        lengths = [length for count, length in self.runs for _ in range(count)]
        last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1  # (prompts,)
        for number, block in enumerate(self.blocks):
            hidden = _write(hidden, self.later.get(number, []))
            key, value = seen[2 * number], seen[2 * number + 1]
            if number < len(self.blocks) - 1:
                queries, keys, values = block.attention_inputs(hidden)
                hidden = block.after_attention(hidden, self._attend(queries, keys, values, key, value))
            else:
                normed = block.norm1(hidden)
                keys, values = block.heads_first(block.k(normed)), block.heads_first(block.v(normed))
                queries = block.heads_first(block.q(normed[:, last]))
                hidden = block.after_attention(hidden[:, last], self._attend(queries, keys, values, key, value))
        return hidden

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each row attends to the shared rows and to the rows of its own prompt up to itself.

        queries  (G, heads, R, C), or one for each prompt (G, heads, prompts, C): its last row
        keys, values  (G, heads, R, C); key, value (1 or G, heads, P, C)
        """
        whole = queries.shape[2] == keys.shape[2]
        queries = queries * queries.shape[-1] ** -0.5
        to_shared = queries @ key.transpose(-1, -2)  # (G, heads, R, P)
        attended, row, asked = [], 0, 0
        for count, length in self.runs:
            own = slice(row, row + count * length)
            ask = own if whole else slice(asked, asked + count)
            rows = length if whole else 1
            query, own_keys, own_values = (
                part.unflatten(2, (count, -1)) for part in (queries[:, :, ask], keys[:, :, own], values[:, :, own])
            )  # (G, heads, count, rows or length, C)
            to_own = query @ own_keys.transpose(-1, -2)  # (G, heads, count, rows, length)
            if whole and length > 1:
                to_own = to_own.masked_fill(_later(length, to_own.device), -torch.inf)
            scores = torch.cat([to_shared[:, :, ask].unflatten(2, (count, rows)), to_own], -1)
            weights = scores.softmax(-1)  # (G, heads, count, rows, P + length)
            shared = weights[..., : key.shape[2]].flatten(2, 3) @ value  # (G, heads, count * rows, C)
            attended.append(shared + (weights[..., key.shape[2] :] @ own_values).flatten(2, 3))
            row, asked = row + count * length, asked + count
        return torch.cat(attended, 2)

    def bytes(self, hidden: Tensor, shared: int) -> int:
        """About how much memory the backward pass keeps of this chunk: measured on CLIP, 26 widths a row and block."""
        rows, width = hidden.shape[0] * hidden.shape[1], hidden.shape[2]
        heads = self.blocks[0].heads
        return len(self.blocks) * rows * (26 * width + 2 * heads * shared) * hidden.element_size()


@cache
def _later(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _per_prompt(insertion: Insertion, classes: int) -> bool:
    tokens = insertion.tokens
    return classes > 1 and tokens.ndim > 2 and tokens.shape[-3] == classes


def _groups(insertions: Sequence[Insertion]) -> int:
    """G, 0 without groups."""
    return max((len(i.tokens) for i in insertions if i.tokens.ndim == 4), default=0)


def _flat(tokens: Tensor, groups: int, classes: int) -> Tensor:
    """Tokens for a plain batch of G * C prompts: (n, W) or (G * C, n, W)."""
    if tokens.ndim == 2 or not groups:
        return tokens
    return tokens.expand(groups, classes, -1, -1).flatten(0, 1)


def _flat_rows(at: int | Tensor, groups: int) -> int | Tensor:
    return at.repeat(groups, 1) if groups and isinstance(at, Tensor) and at.ndim == 2 else at


def _per_group(tokens: Tensor) -> Tensor:
    """Tokens of shared rows: (n, W) -> (1, n, W), (G, 1, n, W) -> (G, n, W), of prompts that agree the first."""
    return tokens[None] if tokens.ndim == 2 else tokens[:1] if tokens.ndim == 3 else tokens[:, 0]


def _put(prefix: Tensor, insertions: Sequence[Insertion]) -> Tensor:
    """(1 or G, P, W) with insertions; grows to G where they differ between groups."""
    for insertion in insertions:
        groups = max(len(prefix), len(insertion.tokens))
        prefix, _ = put_in(
            prefix.expand(groups, -1, -1), replace(insertion, tokens=insertion.tokens.expand(groups, -1, -1))
        )
    return prefix


def _write(hidden: Tensor, changes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Packed rows (1 or G, R, W) with some overwritten: (rows (m,), tokens (1 or G, m, W))."""
    for rows, tokens in changes:
        groups = max(len(hidden), len(tokens))
        hidden = hidden.expand(groups, -1, -1).index_copy(1, rows, tokens.to(hidden.dtype).expand(groups, -1, -1))
    return hidden


def _within(changes: Sequence[tuple[Tensor, Tensor]], rows: slice) -> list[tuple[Tensor, Tensor]]:
    """Those changes that fall into a chunk, counted from its start."""
    kept = [(where, tokens, (where >= rows.start) & (where < rows.stop)) for where, tokens in changes]
    return [(where[here] - rows.start, tokens[:, here]) for where, tokens, here in kept]
