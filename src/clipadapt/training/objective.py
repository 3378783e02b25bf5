"""An objective: what is minimised, as a function of a dictionary of named outputs.

The usual names, of a batch of B items: `image` and `text`, unit features (B, D) or, with K texts an item, (B, K, D);
`image_tokens` (B, N, D) and `text_tokens` (B, L, D); `negatives` (B, K, D), features of texts that are wrong for their
item; `groups` (B,), equal for items that describe the same thing; `labels` (B,); `scale`, the multiplier of cosines,
and `bias`, which is added to them. A source of batches may add names of its own.

Losses of `clipadapt.losses` that have this form: `losses.contrastive.contrast`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Terms = Tensor | dict[str, Tensor]  # a loss (), or its terms by name, whose sum it is
Objective = Callable[[dict[str, Tensor]], Terms]


def total(terms: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The loss (): the sum of its terms, where there are several."""
    return torch.stack(list(terms.values())).sum() if isinstance(terms, Mapping) else terms


def detached(terms: Terms) -> Terms:
    """The same numbers without their graph."""
    return {name: term.detach() for name, term in terms.items()} if isinstance(terms, dict) else terms.detach()
