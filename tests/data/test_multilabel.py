"""Data sets with several labels an image: what they refuse, how they are divided, and what a sample holds."""

from __future__ import annotations

import numpy as np
import pytest

from clipadapt.data import Dataset, FileItem, MultiLabelDataset, as_items, find_duplicates, image_folder
from clipadapt.errors import ClipadaptError, DataError


def dataset(labels, class_names="abcde", **others) -> MultiLabelDataset:
    items = [FileItem(f"{i}.jpg") for i in range(len(labels))]
    return MultiLabelDataset(items, [frozenset(label) for label in labels], list(class_names), **others)


@pytest.fixture
def rooms() -> MultiLabelDataset:
    labels = [{0}, {0, 1}, {1, 2}, set(), {2, 3, 4}, {4}]
    return dataset(labels, domains=["day", "night"] * 3, name="rooms")


@pytest.fixture(scope="module")
def many() -> MultiLabelDataset:
    """A thousand images of eight classes: common and rare ones, some that come together, some images with none."""
    rng = np.random.default_rng(0)
    targets = rng.random((1000, 8)) < [0.4, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01]
    targets[:, 7] |= targets[:, 6] & (rng.random(1000) < 0.5)
    return dataset([np.flatnonzero(row).tolist() for row in targets], "abcdefgh", domains=[str(i) for i in range(1000)])


def test_what_a_data_set_says_of_itself(rooms):
    assert len(rooms) == 6
    assert rooms.counts == [2, 2, 2, 1, 2]
    assert repr(rooms) == "MultiLabelDataset('rooms': 6 images, 5 classes)"
    assert rooms.targets.dtype == bool
    assert rooms.targets.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 0, 1],
    ]
    assert dataset([]).targets.shape == (0, 5)
    assert as_items(rooms) == rooms.items
    assert not isinstance(rooms, Dataset)


def test_select_and_rename_keep_the_lists_parallel(rooms):
    chosen = rooms.rename({"a": "bed"}).select(np.array([4, 1]))
    assert (chosen.paths, chosen.labels) == (["4.jpg", "1.jpg"], [{2, 3, 4}, {0, 1}])
    assert (chosen.domains, chosen.class_names) == (["day", "night"], ["bed", "b", "c", "d", "e"])


def test_only_restricts_the_labels(rooms):
    chosen = rooms.only(["e", "b"])
    assert chosen.class_names == ["e", "b"]
    assert (chosen.paths, chosen.labels) == (["1.jpg", "2.jpg", "4.jpg", "5.jpg"], [{1}, {1}, {0}, {0}])
    with pytest.raises(ClipadaptError, match="Unknown class 'f'"):
        rooms.only(["f"])


def test_a_image_can_be_in_base_and_in_new(rooms):
    base, new = rooms.base_new_split()
    assert (base.class_names, new.class_names) == (["a", "b", "c"], ["d", "e"])
    assert (base.paths, base.labels) == (["0.jpg", "1.jpg", "2.jpg", "4.jpg"], [{0}, {0, 1}, {1, 2}, {2}])
    assert (new.paths, new.labels) == (["4.jpg", "5.jpg"], [{0, 1}, {1}])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"labels": [frozenset()]}, "toys: 2 items but 1 labels"),
        ({"labels": [frozenset(), frozenset({0, 2})]}, "label 2 is not an index into its 2 class names"),
        ({"labels": [frozenset({-1}), frozenset()]}, "label -1 is not an index"),
        ({"labels": [frozenset(), 1]}, r"toys: the labels of image 1 are 1; a frozenset is needed"),
        ({"domains": ["x"]}, "2 items but 1 domains"),
    ],
)
def test_inconsistent_lists_are_refused(rooms, fields, sentence):
    whole = {"items": rooms.items[:2], "labels": rooms.labels[:2], "class_names": ["a", "b"], "name": "toys"}
    with pytest.raises(DataError, match=sentence):
        MultiLabelDataset(**(whole | fields))


@pytest.mark.parametrize("test", [0.2, 0.5])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_split_divides_every_class_in_the_same_share(many, test, seed):
    train, held_out = many.split(test, seed)
    assert sorted(train.paths + held_out.paths) == sorted(many.paths)
    assert train.domains == [path.removesuffix(".jpg") for path in train.paths]
    assert abs(len(held_out) - test * len(many)) <= 15
    for count, total in zip(held_out.counts, many.counts, strict=True):
        assert abs(count - test * total) <= max(1, 0.02 * total)
    without = [sum(not label for label in part.labels) for part in (train, held_out)]
    assert abs(without[1] - test * sum(without)) <= 15


def test_split_is_closer_than_chance(many):
    """What iterative stratification is for: the rare classes' shares (its paper's "labels distribution" measure)."""

    def deviation(held_out):
        return np.mean([abs(n / total - 0.3) for n, total in zip(held_out.counts, many.counts, strict=True)])

    chance = [deviation(many.select(np.random.default_rng(seed).permutation(1000)[:300])) for seed in range(20)]
    assert deviation(many.split(0.3, 1)[1]) < 0.25 * np.mean(chance)


def test_rare_classes_are_on_both_sides_and_single_images_in_train():
    train, test = dataset([{0}] * 20 + [{0, 1}, {0, 1}, {0, 2}, {0, 3}, {3, 4}, {3, 4}]).split(0.1, 1)
    assert test.counts[1] == train.counts[1] == 1
    assert (train.counts[2], test.counts[2]) == (1, 0)
    assert test.counts[4] == train.counts[4] == 1
    assert train.counts[3] >= 1
    assert test.counts[0] >= 1


@pytest.mark.parametrize("k", [2, 5])
def test_folds_are_even_in_every_class(many, k):
    folds = many.folds(k, seed=4)
    assert sorted(path for _, held_out in folds for path in held_out.paths) == sorted(many.paths)
    for train, held_out in folds:
        assert sorted(train.paths + held_out.paths) == sorted(many.paths)
        assert abs(len(held_out) - 1000 / k) <= 10
        for count, total in zip(held_out.counts, many.counts, strict=True):
            assert abs(count - total / k) <= max(1.5, 0.02 * total)


def test_no_fold_is_empty(rooms):
    for seed in range(20):
        assert [len(held_out) for _, held_out in rooms.folds(6, seed)] == [1] * 6


def test_single_labels_are_divided_as_in_plain_stratification():
    labels = [c for c, count in enumerate([10, 5, 4, 1]) for _ in range(count)]
    data = dataset([{label} for label in labels], "abcd")
    assert data.split(0.4, 1)[1].counts == [4, 2, 2, 0]
    assert [held_out.counts for _, held_out in dataset([{0}] * 6 + [{1}] * 9, "ab").folds(3)] == [[2, 3]] * 3


def test_images_without_labels_are_divided_too():
    train, test = dataset([set()] * 10).split(0.3, 1)
    assert (len(train), len(test)) == (7, 3)


def test_few_shot_takes_enough_of_every_class(many):
    for shots in (1, 4, 16):
        support = many.few_shot(shots, seed=1)
        for count, total in zip(support.counts, many.counts, strict=True):
            assert count >= min(shots, total)
        assert len(support) <= 8 * shots
        assert all(support.labels)
        assert len(set(support.paths)) == len(support)
        assert support.paths == sorted(support.paths, key=many.paths.index)


def test_few_shot_counts_what_rarer_classes_took():
    data = dataset([{0, 1}, {0, 1}, {0}, {0}, {0}], "ab")
    assert data.few_shot(2, seed=1).paths == ["0.jpg", "1.jpg"]
    assert data.few_shot(3, seed=1).counts == [3, 2]
    assert data.few_shot(9, seed=1).counts == [5, 2]


def test_all_is_decided_by_the_seed(many):
    for draw in (
        lambda seed: many.split(0.3, seed)[1].paths,
        lambda seed: many.folds(3, seed)[0][1].paths,
        lambda seed: many.few_shot(2, seed).paths,
    ):
        assert draw(1) == draw(1) != draw(2)


def test_impossible_requests_are_refused(rooms):
    with pytest.raises(DataError, match="test must be a fraction between 0 and 1"):
        rooms.split(1.0)
    with pytest.raises(DataError, match=r"between 2 and the number of images \(6\), not 7"):
        rooms.folds(7)
    with pytest.raises(DataError, match="shots must be at least 1, not 0"):
        rooms.few_shot(0)


def test_duplicates_name_all_the_classes(pets):
    (pets / "dog" / "copy.png").write_bytes((pets / "cat" / "0.png").read_bytes())
    items = image_folder(pets).items
    data = MultiLabelDataset(items, [frozenset({1, 0})] * 6 + [frozenset()], ["cat", "dog"])
    (group,) = find_duplicates(data)
    assert [found.class_name for found in group] == ["cat, dog", "cat, dog"]
