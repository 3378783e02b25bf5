"""Exact nearest neighbours among unit features, block by block, so that memory stays bounded."""

from __future__ import annotations

import torch
from torch import Tensor

from clipadapt.errors import ClipadaptError

_CELLS = 1 << 24  # scores held at once: 64 MB in float32
_WIDTH = 1 << 16  # memory rows of a block


def nearest(queries: Tensor, memory: Tensor, k: int, *, cells: int = _CELLS) -> tuple[Tensor, Tensor]:
    """The k rows of `memory` with the largest product with each query: (scores (Q, k'), indices (Q, k') int64).

    Best first, equal scores by the lower index; k' = min(k, M). The result is that of the full product `queries @
    memory.T`, of which no more than about `cells` numbers exist at once.

    Args:
        queries: (Q, D), in blocks; their device is the result's.
        memory: (M, D); M can be 0.
        k: at least 1.

    Raises:
        ClipadaptError: k is below 1, or the widths differ.
    """
    if k < 1:
        raise ClipadaptError(f"k must be at least 1, not {k}.")
    if queries.ndim != 2 or memory.ndim != 2 or queries.shape[1] != memory.shape[1]:
        raise ClipadaptError(
            f"queries {tuple(queries.shape)} and memory {tuple(memory.shape)} must be (Q, D) and (M, D)."
        )
    width = min(_WIDTH, max(len(memory), 1), cells)
    found = [_among(block, memory, k, width) for block in queries.split(max(cells // width, 1))]
    return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


def _among(queries: Tensor, memory: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    scores = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(memory), width):
        new, rows = top(queries @ memory[first : first + width].to(queries.device).T, k)
        # What was found earlier has lower indices and comes first, so a stable sort keeps the lower index of a tie.
        scores, order = torch.cat([scores, new], dim=1).sort(dim=1, descending=True, stable=True)
        indices = torch.cat([indices, rows + first], dim=1).gather(1, order)[:, :k]
        scores = scores[:, :k]
    return scores, indices


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (Q, M): (values, columns), both (Q, min(k, M)).

    Best first, and equal ones by the lower column, which `torch.topk` leaves open.
    """
    k = min(k, scores.shape[1])
    if k == 0:
        return scores[:, :0], torch.empty(len(scores), 0, dtype=torch.int64, device=scores.device)
    values, columns = scores.topk(k, dim=1)
    least = values[:, -1:]
    tied = ((scores >= least).sum(dim=1) > k).nonzero()[:, 0]  # rows with ties on both sides of the cut
    if len(tied):
        rows, limit = scores[tied], least[tied]
        above, equal = rows > limit, rows == limit
        wanted = k - above.sum(dim=1, keepdim=True)
        kept = above | (equal & (equal.cumsum(dim=1) <= wanted))  # k in each row
        columns[tied] = kept.nonzero()[:, 1].view(-1, k)
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
