from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata, wilcoxon

from clipadapt.evaluation.statistics import bootstrap_interval, compare, holm, rank, signed_rank


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05), "the normal interval, for so many"
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


def test_signed_rank_equals_the_enumeration_of_all_signs():
    d = np.array([0.3, -0.1, 0.7, 0.2, 0.5, 0.9])
    ranks = rankdata(np.abs(d))
    signs = np.array([[(k >> i) & 1 for i in range(6)] for k in range(64)])
    sums = signs @ ranks
    observed = ranks[d > 0].sum()
    p = min(1, 2 * min((sums >= observed).mean(), (sums <= observed).mean()))
    assert signed_rank(d) == pytest.approx(p)
    assert signed_rank(np.zeros(5)) == 1
    assert signed_rank([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(2 / 2**5), "five blocks cannot show more"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_compare_counts_and_is_paired():
    a, b = np.array([0.8, 0.7, 0.6, 0.5]), np.array([0.7, 0.7, 0.5, 0.6])
    d = compare(a, b)
    assert (d.wins, d.ties, d.losses) == (2, 1, 1)
    assert d.mean == pytest.approx(0.025)
    assert d.p == pytest.approx(wilcoxon(a - b, zero_method="pratt").pvalue)


def test_ranks_and_cliques():
    rng = np.random.default_rng(1)
    base = rng.uniform(0.3, 0.9, 30)
    scores = {"worst": base - 0.2, "same": base + rng.normal(0, 1e-3, 30), "also": base, "best": base + 0.1}
    found = rank(scores)
    names = list(found.ranks)
    assert (names[0], names[-1]) == ("best", "worst")
    assert found.ranks["best"] == 1
    assert found.ranks["worst"] == 4
    assert [set(clique) for clique in found.cliques] == [{"same", "also"}]
    assert min(found.p.values()) < 1e-5
    tied = rank({"a": [1.0, 2.0], "b": [1.0, 2.0]})
    assert tied.ranks == {"a": 1.5, "b": 1.5}
