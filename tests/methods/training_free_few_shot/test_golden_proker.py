"""ProKeR gives the figures of its authors' code, and its shortcuts and local estimators those of plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

from clipadapt.methods.training_free_few_shot.proker import kernel, local_linear, nadaraya_watson, ridge, ridge_path
from tests.methods.test_golden_features import ENCODERS, Case, close


@pytest.fixture(params=[(e, f"s{shots}_seed1") for e in ENCODERS for shots in (1, 4, 16)], ids=lambda p: "-".join(p))
def case(request, shared):
    return Case(shared, *request.param, "proker")


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    x, keys, values = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((7, 4), (9, 4), (9, 3)))
    return normalize(x, dim=1), normalize(keys, dim=1), values


def test_published_values_by_shots(case):
    head = case.fit("proker")
    assert head.lmbda_ == pytest.approx(float(case["transfer_lmbda"]))
    close(head.logits(case.x[case.probe]) / 100, case["transfer_logits64"], 2e-5)
    assert case.accuracy(head.logits(case.x[case.test])) == pytest.approx(float(case["transfer_acc"]), abs=0.15)


def test_search_on_val(case):
    head = case.fit("proker", val=True)
    assert (head.beta_, head.lmbda_) == pytest.approx((float(case["beta"]), float(case["lmbda"])), rel=1e-6)
    close(head.values_ / 100, case["alpha_i"], 2e-4)
    close(head.logits(case.x[case.probe]) / 100, case["test_logits64"], 3e-5)
    assert case.accuracy(head.logits(case.x[case.test])) == pytest.approx(float(case["test_acc"]), abs=0.15)
    on_val = (head.logits(case.x[case.val]).argmax(1) == case.y[case.val]).double().mean().item()
    assert 100 * on_val == pytest.approx(float(case["val_acc"]))


def test_textbook_solution(case):
    head = case.fit("proker", solution="textbook")
    close(head.logits(case.x[case.probe]) / 100, case["ownref_textbook_cosine_logits64"], 5e-5)
    accuracy = case.accuracy(head.logits(case.x[case.test]))
    assert accuracy == pytest.approx(float(case["ownref_textbook_cosine_acc"]), abs=0.15)


def test_no_correction_is_zero_shot(case):
    zero_shot = case.fit("zero-shot").logits(case.x[case.probe])
    for settings in ({"lmbda": 1e-6}, {"solution": "textbook", "lmbda": 1e7}):
        close(case.fit("proker", **settings).logits(case.x[case.probe]), zero_shot, 1e-4)


@pytest.mark.parametrize("solution", ["published", "textbook"])
def test_path_is_a_solution_for_each_lambda(task, solution):
    x, keys, values = task
    gram, cross = kernel(keys, keys, 2.0), kernel(x, keys, 2.0)
    lmbdas = [0.001, 0.1, 1.0]
    for lmbda, correction in zip(lmbdas, ridge_path(gram, cross, values, lmbdas, solution), strict=True):
        close(correction, cross @ ridge(gram, values, lmbda, solution), 1e-9)
    plain = np.linalg.solve(gram.numpy() / 0.1 + np.eye(9), values.numpy()) / (1 if solution == "published" else 0.1)
    close(ridge(gram, values, 0.1, solution), plain, 1e-10)


def test_nadaraya_watson_is_a_weighted_mean(task):
    x, keys, values = task
    weight = np.exp(-2.0 * (1 - x @ keys.T).numpy())
    close(nadaraya_watson(x, keys, values, 2.0), weight @ values.numpy() / weight.sum(1, keepdims=True), 1e-12)


@pytest.mark.parametrize("lmbda", [0.01, 1.0])
def test_local_linear_is_weighted_ridge_at_each_query(task, lmbda):
    """Against the primal problem: weighted least squares on (1, key - x), the intercept without a penalty."""
    x, keys, values = (a.numpy() for a in task)
    expected = []
    for q in x:
        design, w = np.column_stack([np.ones(9), keys - q]), np.exp(-2.0 * (1 - keys @ q))
        normal = design.T @ (w[:, None] * design) + lmbda * np.diag([0, 1, 1, 1, 1])
        expected.append(np.linalg.solve(normal, design.T @ (w[:, None] * values))[0])
    close(local_linear(*task, 2.0, lmbda), expected, 1e-9)
    close(local_linear(*task, 2.0, 1e8), nadaraya_watson(*task, 2.0), 1e-6)  # no slopes: the weighted mean


@pytest.mark.parametrize("estimator", ["nadaraya-watson", "local-linear"])
def test_local_estimators_search_alpha(shared, estimator):
    c = Case(shared, "clip_vit-b-32", "s4_seed1", "proker")
    plain, searched = c.fit("proker", estimator=estimator), c.fit("proker", estimator=estimator, val=True)
    right = [(head.logits(c.x[c.val]).argmax(1) == c.y[c.val]).double().mean().item() for head in (plain, searched)]
    assert right[1] >= right[0]
    y = one_hot(c.y[c.support], len(c.t)).float()
    x, keys = c.x[c.probe], c.x[c.support]
    if estimator == "nadaraya-watson":
        local = nadaraya_watson(x, keys, y, searched.beta_)
    else:
        local = local_linear(x, keys, y, searched.beta_, searched.lmbda_)
    close(searched.logits(x), 100 * (x @ c.t.T + searched.alpha_ * local), 1e-5)
