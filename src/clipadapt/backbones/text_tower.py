"""The text tower of a backbone: token ids to features, cut or filled as the family was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipadapt.backbones.families import FAMILIES
from clipadapt.backbones.text import clean
from clipadapt.backbones.tower import Tower, unit
from clipadapt.errors import BackboneError


@dataclass(frozen=True)
class TextTokens:
    """What `encode_tokens(ids, tokens=True)` gives.

    pooled  (T, D) the text features
    tokens  (T, L', D) one feature for each token in the same joint space; L' is the length of the longest text
    mask    (T, L') bool: true for a text's tokens, start and end included (but no end token that is also the padding,
            as SigLIP's); what stands in the other rows means nothing
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor


class TextTower(Tower):
    """A tower of texts, with the tokenizer that makes their ids.

    family     "clip", "siglip", ... (a key of `families.FAMILIES`)
    padding    how shorter texts are filled up, see `families.Family`
    tokenizer  None where only token ids can be encoded
    """

    def __init__(self, model: nn.Module, family: str, tokenizer: Any, dim: int) -> None:
        super().__init__(model, "text", FAMILIES[family].text)
        self.family, self.tokenizer, self.dim = family, tokenizer, dim
        self.padding = FAMILIES[family].padding

    @property
    def context_length(self) -> int:
        """Most tokens of a text, start and end included."""
        longest = self.config.max_position_embeddings - FAMILIES[self.family].position_offset
        return min(longest, getattr(self.tokenizer, "model_max_length", longest))

    @property
    def pad_id(self) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return self.config.pad_token_id if pad is None else pad

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """See `Backbone.tokenize`; there must be a tokenizer."""
        specials = self.tokenizer.all_special_tokens
        cleaned = [clean(text, specials) for text in texts]
        if not cleaned:
            return torch.zeros(0, 0, dtype=torch.int64)
        rows = self.tokenizer(cleaned, truncation=True, max_length=self.context_length)["input_ids"]
        ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (T, L)

    def encode(self, ids: Tensor, *, tokens: bool = False, normalize: bool = True) -> Any:
        """See `Backbone.encode_tokens`."""
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise BackboneError(f"Token ids must be (T, L) int64, but are {tuple(ids.shape)} {ids.dtype}.")
        if ids.shape[0] == 0:
            none = torch.zeros(0, self.dim, device=self.device)
            return TextTokens(none, none[:, None], none[:, :1].bool()) if tokens else none
        ids = ids.to(self.device)
        lengths = self._lengths(ids)  # (T,)
        output = self.model.get_text_features(**self._inputs(ids, lengths))
        pooled = unit(output.pooler_output, normalize)
        if not tokens:
            return pooled
        rows = output.last_hidden_state[:, : int(lengths.max())]  # (T, L', W), already normed
        project = self.model.text_model.head if self.padding == "fixed" else self.model.text_projection
        mask = torch.arange(rows.shape[1], device=self.device) < lengths[:, None]
        return TextTokens(pooled, unit(project(rows), normalize), mask)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (..., L) -> their vectors (..., L, W) before positions are added."""
        return self.part("tokens")(ids.to(self.device))

    def project(self, rows: Tensor) -> Tensor:
        """Pooled rows (..., W) as the last block of a causal tower leaves them -> features (..., D)."""
        return self.part("projection")(self.part("norm")(rows))

    def end_positions(self, ids: Tensor) -> Tensor:
        """(T, L) -> (T,) column of the first end token, where a causal tower is pooled."""
        end = self.config.eos_token_id
        if self.family == "clip" and end == 2:  # configurations older than the tokenizer fix: the largest id is meant
            return ids.argmax(1)
        found = ids == end  # (T, L)
        if not found.any(1).all():
            row = int((~found.any(1)).nonzero()[0])
            raise BackboneError(f"Row {row} of the token ids has no end token; each text must end with it.")
        return found.int().argmax(1)

    def _inputs(self, ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """What the tower takes: cut or filled as the family was trained."""
        longest, most = int(lengths.max()), self.context_length
        if longest > most:
            raise BackboneError(f"A text of {longest} tokens exceeds the context length, which is {most}.")
        ids = ids[:, :longest]
        if self.padding == "causal":
            return {"input_ids": ids}
        inside = torch.arange(longest, device=ids.device) < lengths[:, None]  # (T, longest)
        ids = torch.where(inside, ids, self.pad_id)
        if self.padding == "masked":
            return {"input_ids": ids, "attention_mask": inside.long()}
        return {"input_ids": nn.functional.pad(ids, (0, most - longest), value=self.pad_id)}

    def _lengths(self, ids: Tensor) -> Tensor:
        """(T, L) -> (T,) tokens of each text before its padding, be that zeros or the family's own padding token."""
        if self.padding == "causal":
            return self.end_positions(ids) + 1
        used = (ids != 0) & (ids != self.pad_id)
        return torch.where(used, torch.arange(1, ids.shape[1] + 1, device=ids.device), 1).amax(1)

    def _of_blocks(self) -> dict[str, Any]:
        if self.padding == "masked":
            raise BackboneError(f"The text tower of {self.family} cannot resume, since it masks padding.")
        return {"is_causal": True} if self.padding == "causal" else {}
