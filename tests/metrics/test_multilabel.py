"""Multi-label metrics against scikit-learn and counting by hand."""

import numpy as np
import pytest
from sklearn import metrics as sk

from clipadapt.metrics.multilabel import (
    average_precision,
    best_threshold,
    f1_scores,
    mean_average_precision,
    top_k_predictions,
)


def draw(seed=0, ties=False, dtype=float):
    """(200, 6) targets and scores that know something of them; the last class has one positive."""
    rng = np.random.default_rng(seed)
    targets = rng.random((200, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.0]
    targets[7, 5] = True
    scores = targets + rng.normal(size=targets.shape)
    return targets, (np.round(scores) if ties else scores).astype(dtype)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_average_precision_equals_scikit_learns(ties, dtype):
    targets, scores = draw(ties=ties, dtype=dtype)
    np.testing.assert_allclose(
        average_precision(targets, scores), sk.average_precision_score(targets, scores, average=None)
    )
    assert mean_average_precision(targets, scores) == pytest.approx(sk.average_precision_score(targets, scores))
    np.testing.assert_array_equal(
        average_precision(targets.astype(int), scores.tolist()), average_precision(targets, scores)
    )


def test_average_precision_by_hand():
    targets = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    scores = [[9, 1, 5], [8, 1, 6], [7, 1, 7], [6, 1, 8]]
    found = average_precision(targets, scores)
    # positives at places 1 and 3; all equal, so two of four; no positive
    np.testing.assert_allclose(found, [(1 / 1 + 2 / 3) / 2, 2 / 4, np.nan])
    assert mean_average_precision(targets, scores) == pytest.approx((5 / 6 + 1 / 2) / 2)


def test_average_precision_at_the_ends():
    targets = np.array([[True], [True], [False]])
    assert average_precision(targets, [[3], [2], [1]]) == 1.0
    assert average_precision(targets, [[1], [2], [3]]) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert average_precision(targets, [[False], [True], [False]]) == pytest.approx((1 + 2 / 3) / 2)


def test_f1_scores_equal_what_scikit_learns_figures_give():
    targets, scores = draw()
    predicted = scores > 0.6
    found = f1_scores(targets, predicted)
    assert found.overall == pytest.approx(sk.f1_score(targets, predicted, average="micro"))
    precision = sk.precision_score(targets, predicted, average="macro", zero_division=0)
    recall = sk.recall_score(targets, predicted, average="macro")
    assert found.per_class == pytest.approx(2 * precision * recall / (precision + recall))
    assert found.per_class != pytest.approx(sk.f1_score(targets, predicted, average="macro"), abs=1e-3)


def test_f1_scores_by_hand():
    targets = [[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    predicted = [[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]]
    # class 0: 1 of 2 taken, 1 of 2 found; 1: 2 of 2, 2 of 2; 2: never taken, 0 of 1; 3: no positive, 2 taken
    overall, per_class = f1_scores(targets, predicted)
    precision, recall = 3 / 6, 3 / 5
    assert overall == pytest.approx(2 * precision * recall / (precision + recall))
    precision, recall = (1 / 2 + 1 + 0) / 3, (1 / 2 + 1 + 0) / 3
    assert per_class == pytest.approx(2 * precision * recall / (precision + recall))


def test_f1_scores_at_the_ends():
    targets = np.eye(3, dtype=int)
    assert f1_scores(targets, targets) == (1.0, 1.0)
    assert f1_scores(targets, 1 - targets) == (0.0, 0.0)
    assert f1_scores(targets, np.zeros((3, 3))) == (0.0, 0.0)


def test_the_k_highest_classes_are_predicted():
    scores = [[0.1, 0.9, 0.5], [2.0, 2.0, 2.0]]
    assert top_k_predictions(scores, 1).tolist() == [[False, True, False], [True, False, False]]
    assert top_k_predictions(scores, 2).tolist() == [[False, True, True], [True, True, False]]
    assert top_k_predictions(scores, 3).all()
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"between 1 and the number of classes \(3\), not {k}"):
            top_k_predictions(scores, k)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_is_better_than_the_best(seed, ties, dtype):
    targets, scores = draw(seed, ties, dtype)
    best = f1_scores(targets, scores >= best_threshold(targets, scores)).overall
    every = [f1_scores(targets, scores >= level).overall for level in np.unique(scores)]
    assert best == max(every)


def test_best_threshold_by_hand():
    assert best_threshold([[1, 0], [1, 0]], [[0.75, 0.25], [0.5, 0.0]]) == 0.375  # midway, not at either
    assert best_threshold([[1, 1]], [[0.75, 0.25]]) == 0.25  # nothing lies below
    assert best_threshold([[1, 0]], [[0.5, 0.5]]) == 0.5
    assert best_threshold([[1, 0, 0, 0, 1]], [[5, 4, 3, 2, 1]]) == 4.5  # 2/3 for the first alone, 4/7 for all
    assert best_threshold([[1, 0, 1]], [[3, 2, 1]]) == 1.0  # 4/5 for all


def test_best_threshold_holds_where_no_number_lies_between():
    for dtype in (np.float16, np.float32, np.float64):
        upper = dtype(1)
        scores = np.array([[upper, np.nextafter(upper, dtype(0))]])
        assert (scores >= best_threshold([[1, 0]], scores)).tolist() == [[True, False]]


@pytest.mark.parametrize("metric", [mean_average_precision, f1_scores, best_threshold])
def test_without_a_positive_nothing_is_defined(metric):
    with pytest.raises(ValueError, match="at least one positive"):
        metric(np.zeros((3, 2)), np.ones((3, 2)))


@pytest.mark.parametrize("metric", [average_precision, f1_scores, best_threshold])
def test_what_does_not_fit_together_is_refused(metric):
    with pytest.raises(ValueError, match=r"not \(3, 2\) and \(3, 3\)"):
        metric(np.ones((3, 2)), np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"one shape \(N, C\)"):
        metric(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        metric(np.ones((1, 2)), [[0.0, np.nan]])
