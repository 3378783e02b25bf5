"""Metrics against scikit-learn, published figures and counting by hand."""

import numpy as np
import pytest
from sklearn import metrics as sk

from clipadapt.metrics.classification import (
    ClassScores,
    accuracy,
    confusion_matrix,
    confusion_pairs,
    macro_accuracy,
    per_class,
    wilson,
)

NAMES = ["ant", "bee", "cow", "doe"]
LABELS, PREDICTED = [0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 0, 1]


@pytest.fixture(scope="module")
def predictions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 300)
    return labels, np.where(rng.random(300) < 0.6, labels, rng.integers(0, 7, 300))


def test_accuracies_equal_scikit_learns(predictions):
    assert accuracy(*predictions) == pytest.approx(sk.accuracy_score(*predictions))
    assert macro_accuracy(*predictions) == pytest.approx(sk.balanced_accuracy_score(*predictions))


def test_classes_equal_scikit_learns(predictions):
    scores = per_class(*predictions, [f"class {c}" for c in range(7)])
    ours = np.array([(s.precision, s.recall, s.f1, s.support) for s in scores]).T
    np.testing.assert_allclose(ours, np.array(sk.precision_recall_fscore_support(*predictions)))
    np.testing.assert_array_equal(confusion_matrix(*predictions, 7), sk.confusion_matrix(*predictions))


def test_by_hand():
    assert accuracy(LABELS, PREDICTED) == pytest.approx(2 / 6)
    assert macro_accuracy(LABELS, PREDICTED) == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)
    ant, bee, cow, doe = per_class(LABELS, PREDICTED, NAMES)
    assert ant == ClassScores("ant", 3, pytest.approx(1 / 3), pytest.approx(1 / 2), pytest.approx(2 / 5))
    assert bee == ClassScores("bee", 2, pytest.approx(1 / 2), pytest.approx(1 / 4), pytest.approx(1 / 3))
    assert cow == ClassScores("cow", 1, 0.0, None, 0.0)  # never predicted: precision is not defined
    assert doe == ClassScores("doe", 0, None, None, None)  # no image, no prediction


def test_mistakes_come_by_frequency_then_by_class():
    assert confusion_pairs(LABELS, PREDICTED, NAMES) == [("ant", "bee", 2), ("bee", "ant", 1), ("cow", "bee", 1)]
    assert confusion_pairs(LABELS, PREDICTED, NAMES, top=1) == [("ant", "bee", 2)]
    assert confusion_pairs([0, 1], [0, 1], NAMES) == []


def test_wilson_gives_the_published_intervals():
    # Newcombe, "Two-sided confidence intervals for the single proportion" (Stat. Med. 17, 1998), table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_at_the_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(50, 50)[1] == 1.0
    assert wilson(0, 50)[0] == 0.0
    narrow, wide = wilson(5, 10, level=0.5), wilson(5, 10, level=0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


def test_no_image_has_no_accuracy():
    with pytest.raises(ValueError, match="at least one image"):
        accuracy([], [])
