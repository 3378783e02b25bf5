"""Choosing images by their labels: the published few-shot sampler, stratified splits and folds, groups of classes.

Everything here works on lists of labels and returns indices, so that it serves data sets and features alike.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from clipadapt.errors import DataError


def group_by_label(labels: Sequence[int]) -> dict[int, list[int]]:
    """label -> indices of its images, both in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return groups


def sample_shots(labels: Sequence[int], shots: int, rng: random.Random) -> list[int]:
    """Indices of `shots` images per class, as CoOp's code (arXiv 2109.01134) draws them.

    Classes come in order of first appearance in `labels`. Of a class with fewer than `shots` images all are
    taken, none twice, and nothing is drawn from `rng`.
    """
    if shots < 1:
        raise DataError(f"shots must be at least 1, not {shots}.")
    chosen: list[int] = []
    for members in group_by_label(labels).values():
        chosen += rng.sample(members, shots) if len(members) >= shots else members
    return chosen


def stratified_split(labels: Sequence[int], test: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, test) indices, ascending; about the share `test` of every class goes to test.

    A class of two or more images is on both sides; a single image stays in train.
    """
    if not 0 < test < 1:
        raise DataError(f"test must be a fraction between 0 and 1 (such as 0.3), not {test}.")
    rng = random.Random(seed)
    held_out: set[int] = set()
    for _, members in sorted(group_by_label(labels).items()):
        if len(members) >= 2:
            count = min(max(round(test * len(members)), 1), len(members) - 1)
            held_out.update(rng.sample(members, count))
    return [i for i in range(len(labels)) if i not in held_out], sorted(held_out)


def stratified_folds(labels: Sequence[int], k: int, seed: int) -> list[list[int]]:
    """`k` disjoint lists of indices, ascending, whose sizes and whose counts per class differ by at most one."""
    if not 2 <= k <= len(labels):
        raise DataError(f"The number of folds must be between 2 and the number of images ({len(labels)}), not {k}.")
    rng = random.Random(seed)
    folds: list[list[int]] = [[] for _ in range(k)]
    dealt = 0  # dealing continues from class to class, so that small classes do not all land in the first fold
    for _, members in sorted(group_by_label(labels).items()):
        for index in rng.sample(members, len(members)):
            folds[dealt % k].append(index)
            dealt += 1
    return [sorted(fold) for fold in folds]


def class_groups(classes: int, tasks: int, seed: int | None) -> list[list[int]]:
    """The classes 0 to C - 1 in `tasks` groups whose sizes differ by at most one, the larger ones first.

    Their order is drawn by `seed`; with None or 0 it is ascending. Every group has at least two classes.
    """
    if not 1 <= tasks <= classes // 2:
        raise DataError(
            f"{classes} classes cannot be divided into {tasks} tasks; each task needs at least two classes."
        )
    order = random.Random(seed).sample(range(classes), classes) if seed else list(range(classes))
    size, larger = divmod(classes, tasks)
    starts = [task * size + min(task, larger) for task in range(tasks + 1)]
    return [order[start:stop] for start, stop in pairwise(starts)]
