"""Ranking objectives over scores of classes of which an image can show several."""

from __future__ import annotations

from torch import Tensor

# On cosines before `pairwise_ranking` with its margin of 1, so that a gap of 0.25 suffices (TaI-DPT, official code).
FACTOR = 4.0


def pairwise_ranking(scores: Tensor, targets: Tensor, margin: float = 1.0) -> Tensor:
    """Hinge loss over all pairs of a class that is shown and one that is not; a scalar.

        mean over b of  sum_{i in positives of b}  sum_{j in negatives of b}  max(0, margin - scores[b,i] + scores[b,j])

    The sums are not divided by the number of pairs, as in TaI-DPT (arXiv 2211.12739, official code). An example
    without a positive, or without a negative, adds nothing.

    scores: (B, C). targets: (B, C) bool, true where a class is shown. Memory is that of P rows of C scores, with P the
    number of positives in the batch.
    """
    row, positive = targets.nonzero(as_tuple=True)  # (P,) each
    gaps = margin - scores[row, positive, None] + scores[row]  # (P, C)
    return gaps.clamp(min=0)[~targets[row]].sum() / len(scores)
