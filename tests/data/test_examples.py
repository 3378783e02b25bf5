from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from clipadapt.data import (
    BytesItem,
    Dataset,
    Examples,
    Item,
    Split,
    as_items,
    find_duplicates,
    image_folder,
    image_list,
)
from clipadapt.errors import ClipadaptError, DataError


@pytest.fixture
def letters() -> Dataset:
    """Five classes with four images each, in two domains."""
    labels = [c for _ in range(4) for c in range(5)]
    domains = ["photo", "sketch"] * 10
    return image_list([f"{i}.jpg" for i in range(20)], labels, list("abcde"), domains=domains, name="letters")


def test_select_keeps_the_lists_parallel(letters):
    chosen = letters.select([7, 0])
    assert (chosen.paths, chosen.labels, chosen.domains) == (["7.jpg", "0.jpg"], [2, 0], ["sketch", "photo"])
    assert chosen.class_names == letters.class_names
    assert len(letters.select(np.array([1, 2]))) == 2


def test_only_relabels_in_the_order_given(letters):
    chosen = letters.only(["d", "a"])
    assert chosen.class_names == ["d", "a"]
    assert chosen.paths == [path for path, label in zip(letters.paths, letters.labels, strict=True) if label in (0, 3)]
    assert chosen.labels == [1, 0] * 4
    with pytest.raises(ClipadaptError, match="Unknown class 'f'"):
        letters.only(["a", "f"])
    with pytest.raises(DataError, match="a class is given twice"):
        letters.only(["a", "a"])


def test_rename_never_merges(letters):
    assert letters.rename({"a": "b", "b": "a"}).class_names == ["b", "a", "c", "d", "e"]
    with pytest.raises(DataError, match="would merge the classes 'a' and 'b' into 'b'"):
        letters.rename({"a": "b"})
    with pytest.raises(DataError, match="would merge the classes 'a' and 'c' into 'x'"):
        letters.rename({"a": "x", "c": "x"})
    with pytest.raises(ClipadaptError, match="Unknown class 'z'"):
        letters.rename({"z": "y"})


def test_recurring_class_names_are_kept_but_cannot_be_addressed():
    data = image_list(["a.jpg", "b.jpg", "c.jpg"], [0, 1, 2], ["missile", "crane", "missile"])
    assert data.base_new_split()[0].class_names == ["missile", "crane"]
    with pytest.raises(DataError, match="several classes are named 'missile'"):
        data.only(["missile"])


def test_base_and_new_are_the_halves_by_label(letters):
    base, new = letters.base_new_split()
    assert (base.class_names, new.class_names) == (["a", "b", "c"], ["d", "e"])
    assert set(new.labels) == {0, 1}
    assert len(base) + len(new) == len(letters)


def test_split_folds_and_few_shot_return_disjoint_parts(letters):
    train, test = letters.split(test=0.25, seed=3)
    assert test.counts == [1] * 5
    assert set(train.paths).isdisjoint(test.paths)
    folds = letters.folds(4, seed=3)
    assert sorted(path for _, held_out in folds for path in held_out.paths) == sorted(letters.paths)
    assert all(set(train.paths).isdisjoint(held_out.paths) for train, held_out in folds)
    assert letters.few_shot(2, seed=1).counts == [2] * 5
    assert letters.few_shot(2, seed=1).paths == letters.few_shot(2, seed=1).paths != letters.few_shot(2, seed=2).paths


def test_labels_are_the_targets_of_a_data_set(letters):
    assert letters.targets == letters.labels
    assert replace(letters, labels=[0] * 20).targets == [0] * 20
    assert Dataset(letters.items, letters.labels, letters.class_names, letters.domains, "letters") == letters


@dataclass(frozen=True)
class Text(Item[str]):
    name: str
    text: str

    def open(self) -> str:
        return self.text

    def digest(self) -> str:
        return self.text.encode().hex()


@dataclass(frozen=True, repr=False)
class Translations(Examples[str]):
    items: list[Item]
    targets: list[str]
    domains: list[str] | None = None
    name: str = "translations"


def test_examples_may_be_of_anything_and_have_any_target():
    data = Translations([Text("1", "one"), Text("2", "two")], ["un", "deux"])
    assert repr(data) == "Translations('translations': 2 items)"
    assert repr(data.select([1])) == "Translations('translations': 1 items)"
    assert data.select([1, 0]) == Translations(data.items[::-1], ["deux", "un"])
    assert [item.open() for item in as_items(data)] == ["one", "two"]
    with pytest.raises(DataError, match="translations: 2 items but 1 targets"):
        Translations(data.items, ["un"])
    assert not isinstance(data, Dataset)
    assert isinstance(BytesItem("x", b""), Item)


def test_a_stream_gives_every_class_and_image_to_one_step(letters):
    steps = letters.stream(tasks=2, seed=None)
    assert [step.name for step in steps] == ["task 1", "task 2"]
    assert [step.data.class_names for step in steps] == [["a", "b", "c"], ["d", "e"]]
    assert [step.class_names for step in steps] == [["a", "b", "c"], ["a", "b", "c", "d", "e"]]
    assert [step.data.counts for step in steps] == [[4, 4, 4], [4, 4]]
    assert sorted(path for step in steps for path in step.data.paths) == sorted(letters.paths)
    assert steps[1].data == replace(letters.only(["d", "e"]), name="letters, task 2")
    assert letters.stream(tasks=2, seed=0) == steps, "0 is the given order too"


def test_a_stream_is_drawn_by_its_seed_alone(letters):
    orders = {tuple(letters.stream(2, seed=seed)[-1].class_names) for seed in range(1, 9)}
    assert len(orders) > 4
    train, test = letters.split(test=0.25)
    for seed in (1, 2):
        assert [s.class_names for s in train.stream(2, seed)] == [s.class_names for s in test.stream(2, seed)]
    (only,) = letters.stream(tasks=1, seed=None)
    assert (only.data.labels, only.class_names) == (letters.labels, letters.class_names)


@pytest.mark.parametrize("tasks", [0, 3, -1])
def test_a_stream_has_at_least_two_classes_a_task(letters, tasks):
    with pytest.raises(
        DataError, match=f"5 classes cannot be divided into {tasks} tasks; each task needs at least two"
    ):
        letters.stream(tasks)


def test_published_split_samples_before_it_halves(letters):
    split = Split(letters, letters, letters)
    train, val = split.few_shot(16, seed=1)
    assert (train.counts, val.counts) == ([4] * 5, [4] * 5)
    base, new = split.base_new_split()
    assert (base.test.class_names, new.val.class_names) == (["a", "b", "c"], ["d", "e"])


def test_duplicates_are_found_by_content(pets):
    (pets / "dog" / "copy.png").write_bytes((pets / "cat" / "0.png").read_bytes())
    data = image_folder(pets)
    (group,) = find_duplicates(data)
    assert [(found.name, found.class_name) for found in group] == [
        (str(pets / "cat" / "0.png"), "cat"),
        (str(pets / "dog" / "copy.png"), "dog"),
    ]
    assert [data.paths[found.index] for found in group] == [found.name for found in group]
    within, across = Split(data, data.select([]), data.select([])), Split(data, data.select([6]), data.select([0]))
    assert within.duplicates() == []
    assert [sorted({found.part for found in group}) for group in across.duplicates()] == [
        ["test", "train"],
        ["train", "val"],
    ]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"labels": [0]}, "toys: 2 items but 1 labels"),
        ({"labels": [0, 2]}, "label 2 is not an index into its 2 class names"),
        ({"labels": [0, -1]}, "label -1 is not an index"),
        ({"domains": ["x"]}, "2 items but 1 domains"),
    ],
)
def test_inconsistent_lists_are_refused(letters, fields, sentence):
    whole = {"items": letters.items[:2], "labels": [0, 1], "class_names": ["a", "b"], "name": "toys"}
    with pytest.raises(DataError, match=sentence):
        Dataset(**(whole | fields))


def test_labels_may_be_names_numbers_or_arrays():
    assert image_list(["x", "y", "z"], ["dog", "cat", "dog"]).labels == [1, 0, 1]
    assert image_list(["x", "y"], ["b", "a"], ["b", "c", "a"]).labels == [0, 2]
    assert image_list(["x", "y", "z"], np.array([10, 9, 10])).class_names == ["9", "10"]
    assert image_list(np.zeros((2, 8, 8), np.uint8), np.array([1, 0]), ["even", "odd"]).labels == [1, 0]


@pytest.mark.parametrize(
    ("labels", "class_names", "sentence"),
    [
        (["cat", None], None, "image 1 has the label None"),
        ([0.5, 1.0], None, r"image 0 has the label 0\.5; a class name or integer is needed"),
        ([["cat"], ["cat", "dog"]], None, r"image 0 has the label \['cat'\]"),
        (["cat"], None, "2 items but 1 labels"),
        (["cat", "dgo"], ["cat", "dog"], "Unknown class 'dgo'; did you mean 'dog'?"),
        ([0, 5], ["cat", "dog"], "label 5 is not an index into its 2 class names"),
        ([0, 1], "cat", "class_names is the string 'cat'; a list of names is needed"),
    ],
)
def test_unusable_labels_are_refused(labels, class_names, sentence):
    with pytest.raises(ClipadaptError, match=sentence):
        image_list(["a.jpg", "b.jpg"], labels, class_names)


def test_a_list_without_images_is_refused():
    with pytest.raises(DataError, match="images holds no image"):
        image_list([], [])
