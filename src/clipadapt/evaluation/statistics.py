"""Is a difference more than noise? Bootstrap intervals, paired tests, ranks over data sets.

Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets" (JMLR 7, 2006); Benavoli, Corani and Mangili,
"Should We Really Use Post-Hoc Tests Based on Mean-Ranks?" (JMLR 17, 2016): pairs are compared by Wilcoxon's
signed-rank test, not by the distance of mean ranks, with Holm's correction for their number.

A block is what methods are compared on side by side: one data set with its backbone and options, averaged over seeds,
since seeds of one data set are not independent evidence about others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata, wilcoxon


@dataclass(frozen=True)
class Difference:
    """How much a method differs from another on the same blocks.

    Attributes:
        mean: of the paired differences (B,).
        interval: bootstrap interval of that mean, over the blocks.
        p: two-sided, of Wilcoxon's signed-rank test; 1 where all blocks tie.
        wins, ties, losses: blocks.
    """

    mean: float
    interval: tuple[float, float]
    p: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Ranking:
    """Methods over blocks: the mean rank of each (1 is best, ties share), the best first; what cannot be told apart.

    Attributes:
        ranks: method -> mean rank.
        p: (method, method) -> Holm-corrected p of their difference.
        cliques: maximal runs of neighbours in `ranks` within which no pair differs significantly.
    """

    ranks: dict[str, float]
    p: dict[tuple[str, str], float]
    cliques: list[list[str]]


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (N,); of a single value, that value twice."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("an interval needs at least one value")
    drawn = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Difference:
    """`a` minus `b`, paired by block (B,)."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return Difference(
        float(difference.mean()),
        bootstrap_interval(difference, seed=seed),
        signed_rank(difference),
        int((difference > 0).sum()),
        int((difference == 0).sum()),
        int((difference < 0).sum()),
    )


def signed_rank(difference: ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test that differences (B,) are symmetric around 0; ties are split (Pratt).

    With few blocks it is exact, and cannot fall below 2 / 2^B: five blocks never show a difference at 5 %.
    """
    difference = np.asarray(difference, dtype=float)
    if not difference.any():
        return 1.0
    return float(wilcoxon(difference, zero_method="pratt", method="auto").pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the smallest of m values times m, the next times m - 1, ..., never decreasing."""
    order, corrected, least = np.argsort(p), [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = least
    return corrected


def rank(scores: Mapping[str, ArrayLike], *, alpha: float = 0.05) -> Ranking:
    """Rank methods by their scores (B,) on the same blocks, higher is better."""
    names = list(scores)
    table = np.array([np.asarray(scores[name], dtype=float) for name in names])  # (M, B)
    means = rankdata(-table, axis=0).mean(axis=1)
    order = [names[i] for i in np.argsort(means, kind="stable")]
    pairs = list(combinations(order, 2))
    row = dict(zip(names, table, strict=True))
    p = dict(zip(pairs, holm([signed_rank(row[a] - row[b]) for a, b in pairs]), strict=True))
    runs: list[tuple[int, int]] = []
    for start in range(len(order)):
        end = start
        while end + 1 < len(order) and all(p[a, order[end + 1]] > alpha for a in order[start : end + 1]):
            end += 1
        if end > start and not (runs and runs[-1][1] >= end):
            runs.append((start, end))
    ranks = {name: float(means[names.index(name)]) for name in order}
    return Ranking(ranks, p, [order[a : b + 1] for a, b in runs])
