"""Figures of a stream of tasks, against golden ones and against hand-made matrices."""

from __future__ import annotations

import numpy as np
import pytest

from clipadapt.metrics.continual import (
    accuracy_matrix,
    average,
    backward_transfer,
    forgetting,
    forward_transfer,
    last,
    step_accuracies,
)

STREAMS = [f"{encoder}/{steps}/" for encoder in ("clip_vit-b-32", "clip_rn50") for steps in ("4-5", "10-3", "1-2")]
NAN = np.nan


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "continual_clip.npz")


def steps(golden, what):
    return [golden[f"metrics/step{t}/{what}"] for t in range(5)]


def test_the_matrix_of_predictions(golden):
    labels, predicted, tasks = (steps(golden, what) for what in ("targets", "predictions", "tasks"))
    matrix = 100 * accuracy_matrix(labels, predicted, tasks)
    np.testing.assert_allclose(matrix, golden["metrics/ownref_R"], rtol=1e-12)
    np.testing.assert_allclose(matrix[-1], golden["metrics/accuracy_per_task_last"], rtol=1e-12)
    np.testing.assert_allclose(step_accuracies(matrix), golden["metrics/step_accuracy"], rtol=1e-12)
    assert average(matrix) == pytest.approx(float(golden["metrics/average_incremental_accuracy"]), rel=1e-12)


@pytest.mark.parametrize("stream", ["metrics/", *STREAMS])
def test_forgetting_and_backward_transfer(golden, stream):
    matrix = golden[f"{stream}ownref_R"]
    assert forgetting(matrix) == pytest.approx(float(golden[f"{stream}ownref_forgetting_eq3"]), rel=1e-12)
    assert backward_transfer(matrix) == pytest.approx(float(golden[f"{stream}ownref_bwt_lopez_paz"]), rel=1e-12)


def test_the_wrong_definitions_of_a_package_are_not_ours(golden):
    matrix = golden["metrics/ownref_R"]
    assert (forgetting(matrix), backward_transfer(matrix)) == (pytest.approx(25.625), pytest.approx(-25.625))
    assert float(golden["metrics/forgetting_package"]) == 24.375
    assert float(golden["metrics/bwt_package"]) == -16.25


@pytest.mark.parametrize("stream", STREAMS)
def test_accuracies_on_all_classes_so_far_weight_the_tasks_by_their_images(golden, shared, stream):
    encoder = stream.split("/")[0]
    labels = np.load(shared / "data" / "whu-rs19" / f"{encoder}.npz")["labels"]
    order = golden[f"{encoder}/class_order"]
    first, more = map(int, stream.split("/")[1].split("-"))
    counts = np.bincount(labels, minlength=len(order))[order]
    sizes = [part.sum() for part in np.split(counts, range(first, len(order), more))]
    matrix = golden[f"{stream}ownref_R"]
    np.testing.assert_allclose(step_accuracies(matrix, sizes), golden[f"{stream}step_accuracy"], rtol=1e-12)
    assert last(matrix, sizes) == pytest.approx(golden[f"{stream}step_accuracy"][-1], rel=1e-12)
    assert average(matrix, sizes) == pytest.approx(float(golden[f"{stream}average_incremental_accuracy"]), rel=1e-12)


def test_figures_of_a_small_matrix():
    matrix = [[0.8, 0.5, 0.1], [0.9, 0.6, 0.3], [0.6, 0.7, 0.9]]
    assert last(matrix) == pytest.approx(2.2 / 3)
    assert average(matrix) == pytest.approx((0.8 + 0.75 + 2.2 / 3) / 3)
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.6) + (0.6 - 0.7)) / 2), "from the best, not from the first"
    assert backward_transfer(matrix) == pytest.approx(((0.6 - 0.8) + (0.7 - 0.6)) / 2)
    assert forward_transfer(matrix, before=[NAN, 0.4, 0.4]) == pytest.approx(((0.5 - 0.4) + (0.3 - 0.4)) / 2)


def test_a_frozen_model_forgets_nothing():
    matrix = np.tile([0.3, 0.9, 0.6], (3, 1))
    assert (forgetting(matrix), backward_transfer(matrix), forward_transfer(matrix, matrix[0])) == (0, 0, 0)
    assert last([[0.7]]) == average([[0.7]]) == 0.7


def test_matrices_that_say_too_little_are_refused():
    with pytest.raises(ValueError, match=r"an accuracy matrix is \(T, T\), not \(2, 3\)"):
        last(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="at least 2 tasks are needed, not 1"):
        forgetting([[0.5]])
    with pytest.raises(ValueError, match="an accuracy on a task that was learned is NaN"):
        average([[0.5, NAN], [NAN, 0.5]])
    with pytest.raises(ValueError, match="one number for each of 2 tasks"):
        last(np.ones((2, 2)), sizes=[1, 2, 3])
    with pytest.raises(ValueError, match="accuracy on each task before it was learned"):
        forward_transfer([[0.5, NAN], [0.5, 0.5]], before=[0.1, 0.1])
    with pytest.raises(ValueError, match="one accuracy for each of 2 tasks"):
        forward_transfer(np.ones((2, 2)), before=[0.1])


def test_predictions_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="1 arrays of labels, 2 of predictions"):
        accuracy_matrix([[0]], [[0], [0]], [[0]])
    with pytest.raises(ValueError, match="after task 0: shapes"):
        accuracy_matrix([[0, 1]], [[0]], [[0]])
    with pytest.raises(ValueError, match="after task 0: an image of task 1, but there are 1 tasks"):
        accuracy_matrix([[0]], [[0]], [[1]])
