from __future__ import annotations

import shutil

import pytest

from clipadapt.data import image_files, image_folder
from clipadapt.errors import DataError


def test_one_class_per_sub_folder(pets):
    data = image_folder(pets)
    assert data.class_names == ["cat", "dog", "great_owl"]
    assert data.labels == [0, 0, 1, 1, 1, 2]
    assert data.counts == [2, 3, 1]
    assert data.paths[:3] == [str(pets / "cat" / "0.png"), str(pets / "cat" / "1.png"), str(pets / "dog" / "0.png")]
    assert data.items[3].open().getpixel((0, 0)) == (50, 50, 0)
    assert repr(data) == "Dataset('pets': 6 images, 3 classes)"


def test_deeper_folders_and_upper_case_endings_belong_to_the_class(pets):
    (pets / "cat" / "indoors").mkdir()
    shutil.copy(pets / "cat" / "0.png", pets / "cat" / "indoors" / "A.PNG")
    assert image_folder(pets).counts == [3, 3, 1]


def test_hidden_files_and_other_files_are_skipped(pets):
    for name in (".hidden.png", "Thumbs.db", "notes.txt"):
        (pets / "cat" / name).write_bytes(b"x")
    for folder in (".cache", "__MACOSX"):
        (pets / folder).mkdir()
        (pets / folder / "a.png").write_bytes(b"x")
    (pets / "cover.png").write_bytes(b"x")
    data = image_folder(pets)
    assert data.class_names == ["cat", "dog", "great_owl"]
    assert data.counts == [2, 3, 1]


def test_image_files_of_a_flat_folder(pets):
    assert image_files(pets / "cat") == [str(pets / "cat" / "0.png"), str(pets / "cat" / "1.png")]


def test_each_wrong_root_has_its_sentence(tmp_path, pets):
    with pytest.raises(DataError, match="nowhere does not exist; a folder with one sub-folder per class is needed"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"0\.png is a file; a folder"):
        image_folder(pets / "cat" / "0.png")
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", pets)
    with pytest.raises(DataError, match=r"photos\.zip is an archive; unpack it and give the folder"):
        image_folder(archive)
    with pytest.raises(DataError, match="cat holds 2 images and no sub-folders; put the images of each class"):
        image_folder(pets / "cat")
    (pets / "empty").mkdir()
    with pytest.raises(DataError, match=r"The class folder .*empty holds no images"):
        image_folder(pets)


def test_parts_are_not_taken_for_classes(tmp_path, pets):
    shutil.copytree(pets, tmp_path / "parts" / "train")
    shutil.copytree(pets, tmp_path / "parts" / "test")
    with pytest.raises(DataError, match="divided into test and train, which are not classes"):
        image_folder(tmp_path / "parts")
