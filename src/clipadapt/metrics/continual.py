"""Figures of learning from a stream of tasks: what is known at the end, what was forgotten, what was gained in advance.

All of them are read off the accuracy matrix R: row t is after task t was learned, column k is the accuracy on the test
images of task k, in the unit of the accuracies. Entries above the diagonal (tasks that are still to come) may
be NaN, except for `forward_transfer`. T is the number of tasks; counting from 1,

    last                (1/T) sum_k R[T, k]
    average             (1/T) sum_t (1/t) sum_{k<=t} R[t, k]
    forgetting          1/(T-1) sum_{k<T} (max_{k<=t<T} R[t, k] - R[T, k])    Chaudhry et al., arXiv 1801.10112, eq. 3
    backward transfer   1/(T-1) sum_{k<T} (R[T, k] - R[k, k])         Lopez-Paz and Ranzato, arXiv 1706.08840, eq. 3
    forward transfer    1/(T-1) sum_{k>1} (R[k-1, k] - b[k])                                           the same, eq. 4

with b the accuracies before anything was learned. Where tasks have test sets of different sizes, the literature on
class-incremental learning weights tasks by their images ("accuracy on all classes so far"): give `sizes` for that.

The package continuum (1.2.7), with which several published figures of CLIP were made, computes three of these
otherwise: its forgetting sums over too few earlier tasks but divides by all of them, its backward transfer leaves out
the task just before each and averages over all rows, and its forward transfer averages the entries below the diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def accuracy_matrix(
    labels: Sequence[ArrayLike], predicted: Sequence[ArrayLike], tasks: Sequence[ArrayLike]
) -> np.ndarray:
    """(T, T) accuracies in [0, 1] from the predictions after each task; NaN if a task was not tested.

    Args:
        labels: T arrays, the t-th with the true classes of the images tested after task t, (N_t,).
        predicted: T arrays of the classes predicted for them.
        tasks: T arrays with the task, 0 to T - 1, that each of these images belongs to.

    Raises:
        ValueError: the arrays do not fit together, or an image is of no task in 0 to T - 1.
    """
    steps = len(labels)
    if not steps == len(predicted) == len(tasks):
        raise ValueError(f"{steps} arrays of labels, {len(predicted)} of predictions and {len(tasks)} of tasks")
    matrix = np.full((steps, steps), np.nan)
    for t in range(steps):
        true, found, task = (np.asarray(values[t]) for values in (labels, predicted, tasks))
        if not (true.ndim == 1 and true.shape == found.shape == task.shape):
            raise ValueError(f"after task {t}: shapes {true.shape}, {found.shape} and {task.shape}; all must be (N,)")
        for k in np.unique(task):
            if not 0 <= k < steps:
                raise ValueError(f"after task {t}: an image of task {k}, but there are {steps} tasks, 0 to {steps - 1}")
            matrix[t, k] = np.mean(found[task == k] == true[task == k])
    return matrix


def last(matrix: ArrayLike, sizes: ArrayLike | None = None) -> float:
    """The accuracy after the last task: mean of the last row, weighted by `sizes` (T,) if they are given."""
    return float(step_accuracies(matrix, sizes)[-1])


def average(matrix: ArrayLike, sizes: ArrayLike | None = None) -> float:
    """The average incremental accuracy: mean over all steps of the accuracy on the tasks so far."""
    return float(step_accuracies(matrix, sizes).mean())


def step_accuracies(matrix: ArrayLike, sizes: ArrayLike | None = None) -> np.ndarray:
    """(T,) mean accuracy on the tasks so far after each task, weighted by `sizes` (T,), the numbers of test images."""
    seen = _seen(matrix)
    weights = np.ones(len(seen)) if sizes is None else np.asarray(sizes, dtype=float)
    if weights.shape != (len(seen),):
        raise ValueError(f"sizes must be one number for each of {len(seen)} tasks, not {weights.shape}")
    return np.array([np.average(row[: t + 1], weights=weights[: t + 1]) for t, row in enumerate(seen)])


def forgetting(matrix: ArrayLike) -> float:
    """How far each task's accuracy has fallen from its best before the last task; negative where it rose further."""
    seen = _seen(matrix, least=2)
    return float(np.mean([seen[k:-1, k].max() - seen[-1, k] for k in range(len(seen) - 1)]))


def backward_transfer(matrix: ArrayLike) -> float:
    """What later tasks added to the accuracy on earlier ones; negative where they are forgotten."""
    seen = _seen(matrix, least=2)
    return float(np.mean(seen[-1, :-1] - np.diag(seen)[:-1]))


def forward_transfer(matrix: ArrayLike, before: ArrayLike) -> float:
    """What earlier tasks added to the accuracy on the next one, before it was learned.

    Args:
        matrix: (T, T), tested on each task also after the task before it.
        before: (T,) accuracies before the first task; of CLIP, those of zero-shot.
    """
    values = _square(matrix, least=2)
    start, ahead = np.asarray(before, dtype=float), np.diag(values, 1)
    if start.shape != (len(values),):
        raise ValueError(f"before must be one accuracy for each of {len(values)} tasks, not {start.shape}")
    if np.isnan(ahead).any() or np.isnan(start[1:]).any():
        raise ValueError("forward_transfer needs the accuracy on each task before it was learned, and one is NaN")
    return float(np.mean(ahead - start[1:]))


def _seen(matrix: ArrayLike, least: int = 1) -> np.ndarray:
    """The matrix, known on and below the diagonal."""
    values = _square(matrix, least)
    if np.isnan(values[np.tril_indices(len(values))]).any():
        raise ValueError("an accuracy on a task that was learned is NaN")
    return values


def _square(matrix: ArrayLike, least: int) -> np.ndarray:
    values = np.asarray(matrix, dtype=float)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"an accuracy matrix is (T, T), not {values.shape}")
    if len(values) < least:
        raise ValueError(f"at least {least} tasks are needed, not {len(values)}")
    return values
