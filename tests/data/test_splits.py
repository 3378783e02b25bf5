"""The sampler gives the published few-shot lists; splits and folds are stratified and disjoint."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from clipadapt.data import coop_split
from clipadapt.data.splits import class_groups, sample_shots, stratified_folds, stratified_split
from clipadapt.errors import DataError

PUBLISHED = {"caltech101": "split_zhou_Caltech101.json", "dtd": "split_zhou_DescribableTextures.json"}
LABELS = [0] * 10 + [2] * 5 + [1] * 2 + [3]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_few_shot_lists_are_reproduced(shared, name):
    folder = shared / "data" / "coop-splits"
    split = coop_split(folder / PUBLISHED[name], root="/")
    lists = sorted((folder / "indices" / name).glob("shot_*-seed_*.json"))
    assert len(lists) == 15
    for file in lists:
        shots, seed = (int(part.split("_")[1]) for part in file.stem.split("-"))
        published = json.loads(file.read_text())
        for part, ours in zip(("train", "val"), split.few_shot(shots, seed), strict=True):
            theirs = [(_tail(datum["impath"]), datum["label"]) for datum in published[part]["data"]]
            assert [(_tail(path), label) for path, label in zip(ours.paths, ours.labels, strict=True)] == theirs, file
        assert split.train.few_shot(shots, seed).paths == split.few_shot(shots, seed)[0].paths


def _tail(path: str) -> str:
    return "/".join(Path(path).parts[-2:])  # class folder and file name


def test_sampler_takes_all_of_a_small_class_and_draws_nothing_for_it():
    chosen = sample_shots(LABELS, 4, random.Random(3))
    assert Counter(LABELS[i] for i in chosen) == {0: 4, 2: 4, 1: 2, 3: 1}
    assert len(set(chosen)) == len(chosen)
    without_small = [label for label in LABELS if label not in (1, 3)]
    assert sample_shots(without_small, 4, random.Random(3)) == chosen[:8]


def test_sampler_leaves_the_global_stream_alone():
    random.seed(5)
    before = random.getstate()
    sample_shots(LABELS, 2, random.Random(0))
    stratified_split(LABELS, 0.3, 0)
    stratified_folds(LABELS, 3, 0)
    assert random.getstate() == before


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_split_has_every_class_of_two_on_both_sides(share):
    train, test = stratified_split(LABELS, share, seed=1)
    assert sorted(train + test) == list(range(len(LABELS)))
    assert {LABELS[i] for i in train} == {0, 1, 2, 3}
    assert {LABELS[i] for i in test} == {0, 1, 2}
    assert stratified_split(LABELS, share, seed=1) == (train, test)
    assert sum(LABELS[i] == 0 for i in test) == min(max(round(share * 10), 1), 9)


def test_other_seeds_give_other_splits():
    assert len({tuple(stratified_split(LABELS, 0.3, seed)[1]) for seed in range(20)}) > 15


def test_folds_cover_each_image_once_and_are_even():
    folds = stratified_folds(LABELS, 4, seed=1)
    assert sorted(index for fold in folds for index in fold) == list(range(len(LABELS)))
    assert max(map(len, folds)) - min(map(len, folds)) <= 1
    for label in range(4):
        counts = [sum(LABELS[i] == label for i in fold) for fold in folds]
        assert max(counts) - min(counts) <= 1


def test_impossible_requests_are_refused():
    with pytest.raises(DataError, match="shots must be at least 1, not 0"):
        sample_shots(LABELS, 0, random.Random(0))
    with pytest.raises(DataError, match=r"test must be a fraction between 0 and 1 \(such as 0\.3\), not 30"):
        stratified_split(LABELS, 30, 0)
    with pytest.raises(DataError, match=r"between 2 and the number of images \(18\), not 1"):
        stratified_folds(LABELS, 1, 0)


@pytest.mark.parametrize(("classes", "tasks", "sizes"), [(19, 4, [5, 5, 5, 4]), (10, 5, [2] * 5), (3, 1, [3])])
def test_groups_of_classes_differ_by_at_most_one(classes, tasks, sizes):
    for seed in (None, 0, 1, 2):
        groups = class_groups(classes, tasks, seed)
        assert [len(group) for group in groups] == sizes
        together = [c for group in groups for c in group]
        assert sorted(together) == list(range(classes))
        assert (together == sorted(together)) == (not seed)
