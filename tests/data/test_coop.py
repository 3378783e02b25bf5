from __future__ import annotations

import json

import pytest

from clipadapt.data import coop_split
from clipadapt.errors import DataError

ENTRY = ["cat/0.png", 0, "cat"]
PARTS = {"train": [ENTRY, ["dog/0.png", 1, "dog"]], "val": [["dog/1.png", 1, "dog"]], "test": [["cat/1.png", 0, "cat"]]}


def write(folder, content):
    (folder / "split.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "split.json"


def test_parts_share_their_classes_and_read_below_root(pets, tmp_path):
    split = coop_split(write(tmp_path, PARTS), root=pets)
    assert (split.train.labels, split.val.labels, split.test.labels) == ([0, 1], [1], [0])
    assert split.train.class_names == split.val.class_names == split.test.class_names == ["cat", "dog"]
    assert split.val.items[0].open().getpixel((0, 0)) == (50, 50, 0)


def test_root_is_the_files_own_folder_by_default(pets):
    assert coop_split(write(pets, PARTS)).test.items[0].open().getpixel((0, 0)) == (0, 50, 0)


def test_root_may_be_absent_until_an_image_is_read(tmp_path):
    split = coop_split(write(tmp_path, PARTS), root=tmp_path / "later")
    assert split.few_shot(1, seed=1)[0].counts == [1, 1]
    with pytest.raises(DataError, match=r"later/cat/0\.png cannot be read"):
        split.train.items[0].open()


def test_real_split_files(shared):
    for name, sizes in {"Caltech101": (4128, 1649, 2465, 100), "DescribableTextures": (2820, 1128, 1692, 47)}.items():
        split = coop_split(shared / "data" / "coop-splits" / f"split_zhou_{name}.json")
        parts = (split.train, split.val, split.test)
        assert (*map(len, parts), len(split.train.class_names)) == sizes


def test_real_images_are_where_the_split_says(shared):
    split = coop_split(
        shared / "data" / "coop-splits" / "split_zhou_Caltech101.json",
        root=shared / "data" / "caltech101" / "101_ObjectCategories",
    )
    few, _ = split.few_shot(1, seed=1)
    assert all(item.open().mode == "RGB" for item in few.items[::10])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"split\.json is not valid JSON"),
        ([], 'lists under "train", "val" and "test" are needed'),
        ({"train": [], "val": []}, 'lists under "train", "val" and "test" are needed'),
        (PARTS | {"val": [["x.png", "cat"]]}, r"val\[0\] is \['x.png', 'cat'\]; \[path, label, class name\] is needed"),
        (PARTS | {"val": [["x.png", 0, "dog"]]}, r"val\[0\]: label 0 is 'dog' here and 'cat' before"),
        (PARTS | {"val": [["x.png", 5, "owl"]]}, "the labels must be 0 to 2 without gaps"),
    ],
)
def test_each_wrong_split_file_has_its_sentence(tmp_path, content, sentence):
    with pytest.raises(DataError, match=sentence):
        coop_split(write(tmp_path, content))


def test_a_missing_split_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"split\.json cannot be read: No such file"):
        coop_split(tmp_path / "split.json")
