from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from clipadapt.metrics.calibration import confidences, expected_calibration_error, risk_coverage, temperature


def test_calibration_error_by_hand():
    confidence, hits = [0.95, 0.95, 0.55, 0.52], [1, 0, 1, 1]
    error, bins = expected_calibration_error(confidence, hits, bins=10)
    assert error == pytest.approx(0.5 * 0.45 + 0.5 * (1 - 0.535))
    assert [(b["bin"], b["pictures"]) for b in bins] == [(5, 2), (9, 2)]
    assert expected_calibration_error([0.5], [1], bins=2)[1][0]["bin"] == 0, "a bin is closed above"
    assert expected_calibration_error([1.0, 0.0], [1, 0])[0] == 0
    with pytest.raises(ValueError, match="at least one"):
        expected_calibration_error([], [])


def test_a_calibrated_model_has_no_error():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 100_000)
    hits = rng.random(100_000) < confidence
    assert expected_calibration_error(confidence, hits)[0] < 0.01


def test_risk_coverage_equals_the_plain_sum_and_ties_do_not_depend_on_order():
    confidence, hits = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    area, coverage, risk = risk_coverage(confidence, hits)
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert area == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 1 / 2]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    tied, order = np.array([0.5, 0.5, 0.5, 0.9]), [2, 0, 3, 1]
    assert risk_coverage(tied, hits)[0] == pytest.approx(risk_coverage(tied[order], hits[order])[0])


def test_confidences_and_temperature():
    torch.manual_seed(0)
    logits, labels = 6 * torch.randn(200, 5), torch.randint(0, 5, (200,))
    logits[range(200), labels] += 5
    confidence, hits = confidences(logits, labels)
    assert confidence == pytest.approx(logits.double().softmax(1).amax(1).numpy())
    assert (hits == (logits.argmax(1) == labels).numpy()).all()
    best = minimize_scalar(lambda t: float(cross_entropy(logits.double() / np.exp(t), labels)), bounds=(-4, 4)).x
    assert temperature(logits, labels) == pytest.approx(np.exp(best), rel=1e-3)
