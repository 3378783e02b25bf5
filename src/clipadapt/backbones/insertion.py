"""Tokens that are put into a tower's sequence of rows, and taken out of it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from clipadapt.errors import BackboneError


@dataclass(frozen=True, eq=False)
class Insertion:
    """Tokens that take part in a tower's computation; gradients reach them.

    tokens  (n, W), the same for the whole batch, or (B, n, W), one set for each image or text
    at      row of the first token in the sequence as it is afterwards, the others follow; in the vision tower it may
            be negative and then counts from the end. With "replace" also an int64 tensor of rows, (n,) or (B, n)
    layer   "input": the embeddings. A text row replaced there gets its position added like the word it stands for;
            an inserted row gets none, and a vision row passes the norm before the first block like all others.
            j >= 0: directly before block j, counted from 0
    mode    "replace" overwrites rows, "insert" puts new ones in between. Inserted rows lengthen the sequence until the
            last block, then leave it: pooling sees the rows it was trained on (`ImageTokens.inserted` has the rest)

    CoOp:      text=[Insertion(ctx, at=1)], where the token ids hold n placeholder words behind the start token
    CoCoOp:    the same with tokens (B * C, n, W) and the ids repeated for each image
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
