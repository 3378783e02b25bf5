"""How good is a search: Recall@k, mAP, nDCG@k and median rank from features, in blocks of queries.

What belongs together has the same group number: an image and its captions, or the images of a class. An item of
the gallery is relevant to a query when their groups are equal. Items rank by their product with the query, the largest
first; ties rank by number, as in `features.retrieval.nearest` and every exact search here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipadapt.errors import ClipadaptError
from clipadapt.renamed import old_argument

_CELLS = 1 << 24  # scores held at once: 64 MB in float32


@dataclass(frozen=True)
class RetrievalScores:
    """Means over the queries that have something relevant in the gallery; shares are in [0, 1].

    queries      how many these are
    recall       k -> share of queries with at least one relevant item among the first k; this is what papers on
                 image-text retrieval call Recall@k (R@k), not the share of the relevant items that were found
    mean_average_precision
                 mAP: the mean, over a query's relevant items, of the precision down to their ranks
    ndcg         k -> gains of 1 over log2(1 + rank), as a share of the best possible order's
    median_rank  of the best relevant item, from 1; between the middle two of an even number of queries
    """

    queries: int
    recall: dict[int, float]
    mean_average_precision: float
    ndcg: dict[int, float]
    median_rank: float


@old_argument("picture_of", "image_of")
def text_to_image(texts: Any, images: Any, image_of: Any, ks: Sequence[int] = (1, 5, 10)) -> RetrievalScores:
    """Each text looks for its image: texts (T, D), images (N, D), and `image_of` (T,) the images' numbers."""
    return retrieval_scores(texts, images, image_of, np.arange(len(images)), ks)


@old_argument("picture_of", "image_of")
def image_to_text(images: Any, texts: Any, image_of: Any, ks: Sequence[int] = (1, 5, 10)) -> RetrievalScores:
    """Each image looks for its texts, of which it can have several: arguments as in `text_to_image`."""
    return retrieval_scores(images, texts, np.arange(len(images)), image_of, ks)


def image_to_image(images: Any, labels: Any, ks: Sequence[int] = (1, 5, 10)) -> RetrievalScores:
    """Each image looks for the others of its class; itself is left out. Images (N, D), labels (N,) int."""
    return retrieval_scores(images, images, labels, labels, ks, others=True)


def retrieval_scores(
    queries: Any,
    gallery: Any,
    query_groups: Any,
    gallery_groups: Any,
    ks: Sequence[int] = (1, 5, 10),
    *,
    others: bool = False,
    cells: int = _CELLS,
) -> RetrievalScores:
    """The scores of Q queries over a gallery of M.

    Args:
        queries: unit features (Q, D), torch or numpy.
        gallery: unit features (M, D).
        query_groups: (Q,) ints.
        gallery_groups: (M,) ints.
        ks: the cuts, each at least 1; one above M counts the whole gallery.
        others: queries and gallery are the same list, and no item finds itself.
        cells: about how many products exist at once.

    Raises:
        ClipadaptError: shapes do not fit, features are not finite, a cut is below 1, or no query has anything relevant.
    """
    q, g = _features(queries, "queries"), _features(gallery, "gallery")
    q_groups, g_groups = _groups(query_groups, q, "query_groups"), _groups(gallery_groups, g, "gallery_groups")
    if q.shape[1] != g.shape[1] or (others and len(q) != len(g)):
        raise ClipadaptError(f"queries {tuple(q.shape)} and gallery {tuple(g.shape)} do not match.")
    if not ks or min(ks) < 1:
        raise ClipadaptError(f"Every k must be at least 1, not {list(ks)}.")
    discounts = 1 / torch.log2(torch.arange(2, len(g) + 2, dtype=torch.float64))  # (M,)
    firsts, precisions = [], []
    gains: dict[int, list[Tensor]] = {k: [] for k in ks}
    rows = max(cells // max(len(g), 1), 1)
    for start in range(0, len(q), rows):
        scores = q[start : start + rows] @ g.T  # (B, M)
        mine = torch.arange(start, start + len(scores))
        relevant = q_groups[mine, None] == g_groups  # (B, M)
        if others:  # to the very end, where it affects nothing
            scores[torch.arange(len(scores)), mine] = -torch.inf
            relevant[torch.arange(len(scores)), mine] = False
        order = scores.argsort(dim=1, descending=True, stable=True)
        hits = relevant.gather(1, order)
        hits = hits[hits.any(1)].double()  # (B', M), in the order of ranks
        count = hits.sum(1)  # (B',)
        firsts.append(hits.argmax(1) + 1)
        ranks = torch.arange(1, len(g) + 1)
        precisions.append((hits * hits.cumsum(1) / ranks).sum(1) / count)
        for k in ks:
            best = discounts.cumsum(0)[count.clamp(max=min(k, len(g))).long() - 1]
            gains[k].append((hits[:, :k] * discounts[:k]).sum(1) / best)
    first = torch.cat(firsts) if firsts else torch.empty(0)
    if not len(first):
        raise ClipadaptError("No query has anything relevant in the gallery; are the groups those of both?")
    return RetrievalScores(
        queries=len(first),
        recall={k: float((first <= k).double().mean()) for k in ks},
        mean_average_precision=float(torch.cat(precisions).mean()),
        ndcg={k: float(torch.cat(gains[k]).mean()) for k in ks},
        median_rank=float(np.median(first.numpy())),
    )


def _features(values: Any, what: str) -> Tensor:
    features = torch.as_tensor(values).float().cpu()
    if features.ndim != 2 or not torch.isfinite(features).all():
        raise ClipadaptError(f"{what} must be finite features (N, D), not {tuple(features.shape)}.")
    return features


def _groups(values: Any, features: Tensor, what: str) -> Tensor:
    groups = torch.as_tensor(np.asarray(values))
    if groups.shape != (len(features),) or groups.is_floating_point():
        raise ClipadaptError(f"{what} must be {len(features)} ints, one for each feature.")
    return groups
