from __future__ import annotations

import json

import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.cli.adapt import create_method
from clipadapt.data import (
    class_texts,
    coop_split,
    image_folder,
    image_list,
    template_sets,
    with_published_names,
)
from clipadapt.errors import ClipadaptError, DataError
from tests.tiny import tiny_clip

DATA_SETS = ["imagenet", "caltech101", "pets", "cars", "flowers102", "food101", "aircraft", "sun397", "dtd", "eurosat"]
DATA_SETS += ["ucf101"]


@pytest.mark.parametrize(
    ("templates", "sentence"),
    [
        ("photo", "a photo of a sea horse."),
        ("caltech101", "a photo of a sea horse."),
        ("coop/pets", "a photo of a sea horse, a type of pet."),
        ("pets", "a photo of a sea horse, a type of pet."),
        ("food101", "a photo of sea horse, a type of food."),
        ("ucf101", "a photo of a person doing sea horse."),
        ("dtd", "sea horse texture."),
        ("transclip/dtd", "sea horse texture"),
        ("kgcoop/dtd", "a photo of a sea horse, a type of texture."),
        ("prograd/dtd", "a texture of sea horse."),
        ("prograd/aircraft", "a type of aircraft, a photo of a sea horse."),
        ("prograd/eurosat", "a centered satellite photo of sea horse."),
        ("clip-lora/eurosat", "a photo of a sea horse."),
        ("a sketch of {}", "a sketch of sea horse"),
        (["{}"], "sea horse"),
    ],
)
def test_published_templates_and_own_ones(templates, sentence):
    assert class_texts(["sea_horse"], templates) == [[sentence]]


def test_ensembles():
    (eighty,) = class_texts(["cat"], "openai-80")
    (eight,) = class_texts(["cat"], "imagenet-8")
    (seven,) = class_texts(["cat"], "imagenet-7")
    assert (len(set(eighty)), len(eight), len(seven)) == (80, 8, 7)
    assert (eighty[0], eighty[-1]) == ("a bad photo of a cat.", "a tattoo of the cat.")
    assert eight == [*seven, "a photo of a cat."]
    assert set(eight) < set(eighty)


def test_every_convention_covers_every_data_set():
    conventions = ["coop", "kgcoop", "prograd", "clip-lora", "transclip"]
    expected = [f"{convention}/{data}" for convention in conventions for data in DATA_SETS]
    assert template_sets() == sorted([*expected, *DATA_SETS, "photo", "imagenet-7", "imagenet-8", "openai-80"])
    for name in template_sets():
        assert all("cat" in text for text in class_texts(["cat"], name)[0])


def test_a_class_keeps_braces_in_its_name():
    assert class_texts(["{x}"], "a {} {}") == [["a {x} {x}"]]


def test_own_sentences_per_class():
    own = {"sea_horse": ["It swims.", "It is small."], "big cat": "It roars.", "dog": ["unused"]}
    assert class_texts(["big_cat", "sea_horse"], own) == [["It roars."], ["It swims.", "It is small."]]
    with pytest.raises(DataError, match="The class 'owl' has no list of sentences"):
        class_texts(["owl"], own)


def test_own_files(tmp_path):
    (tmp_path / "mine.txt").write_text("a {} on a table\n\n  my {}\n", encoding="utf-8-sig")
    assert class_texts(["cat"], tmp_path / "mine.txt") == [["a cat on a table", "my cat"]]
    assert class_texts(["cat"], str(tmp_path / "mine.txt")) == [["a cat on a table", "my cat"]]
    (tmp_path / "list.json").write_text('["{}!"]')
    assert class_texts(["cat"], tmp_path / "list.json") == [["cat!"]]
    (tmp_path / "own.json").write_text(json.dumps({"cat": ["It purrs."]}))
    assert class_texts(["cat"], tmp_path / "own.json") == [["It purrs."]]
    (tmp_path / "list.yaml").write_text("- '{}!'\n- my {}\n")
    assert class_texts(["cat"], tmp_path / "list.yaml") == [["cat!", "my cat"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.json", '{"sea horse": ["It swims.", "Look: a crown."], "7": "A digit."}'),
        ("own.yaml", "sea horse:\n  - It swims.\n  - 'Look: a crown.'\n7: A digit.\n"),
        ("OWN.YML", "sea horse: [It swims., 'Look: a crown.']\n7: A digit.\n"),
        ("own.txt", "sea horse: It swims.\n7: A digit.\n\nsea horse:  Look: a crown.\n"),
    ],
)
def test_files_of_own_sentences_per_class(tmp_path, name, content):
    """The same mapping in every form, by path or by the path's name, as `--templates FILE` gives it."""
    (tmp_path / name).write_text(content)
    for file in (tmp_path / name, str(tmp_path / name)):
        assert class_texts(["7", "sea_horse"], file) == [["A digit."], ["It swims.", "Look: a crown."]]


def test_own_sentences_from_the_command_line(tmp_path):
    """`--templates FILE` makes a classifier of the mean unit features of each class's own sentences."""
    (tmp_path / "own.txt").write_text("red: a small red house\nred: the red star\nblue: a blue cat\n")
    backbone = load_backbone(tiny_clip())
    model = create_method("zero-shot", [], str(tmp_path / "own.txt")).fit(backbone, class_names=["blue", "red"])
    with torch.no_grad():
        one, two, three = backbone.encode_texts(["a blue cat", "a small red house", "the red star"])
    expected = torch.stack([one, torch.nn.functional.normalize(two + three, dim=0)])
    torch.testing.assert_close(model.logits(torch.eye(backbone.dim)), backbone.logit_scale * expected.T)


def test_each_wrong_template_has_its_sentence(tmp_path):
    with pytest.raises(ClipadaptError, match="Unknown template set 'openai-8'; did you mean 'openai-80'"):
        class_texts(["cat"], "openai-8")
    with pytest.raises(DataError, match=r"The template 'a photo of a cat' lacks the \{\} where the class name goes"):
        class_texts(["cat"], "a photo of a cat")
    with pytest.raises(DataError, match=r"The template 'my cat' lacks the \{\}"):
        class_texts(["cat"], ["a {}", "my cat"])
    with pytest.raises(DataError, match="The list of templates is empty"):
        class_texts(["cat"], [])
    with pytest.raises(DataError, match=r"none\.txt cannot be read: No such file"):
        class_texts(["cat"], "none.txt")
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(DataError, match=r"bad\.json is damaged"):
        class_texts(["cat"], tmp_path / "bad.json")
    (tmp_path / "bad.yaml").write_text("cat: [")
    with pytest.raises(DataError, match=r"bad\.yaml is damaged"):
        class_texts(["cat"], tmp_path / "bad.yaml")
    with pytest.raises(DataError, match="The class 'cat' has no list of sentences"):
        class_texts(["cat"], {"cat": 3})  # type: ignore[dict-item]
    (tmp_path / "mixed.txt").write_text("cat: It purrs.\nIt has whiskers.\n")
    with pytest.raises(DataError, match=r"The template 'cat: It purrs.' lacks the \{\}"):
        class_texts(["cat"], tmp_path / "mixed.txt")
    (tmp_path / "number.json").write_text("7")
    with pytest.raises(DataError, match=r"number\.json must hold a list of templates or"):
        class_texts(["cat"], tmp_path / "number.json")


def test_published_class_names():
    caltech = image_list(list("abcd"), ["Faces", "BACKGROUND_Google", "Faces_easy", "airplanes"])
    assert with_published_names(caltech, "caltech101").class_names == ["face", "airplane"]
    eurosat = image_list(list("abc"), ["SeaLake", "River", "AnnualCrop"])
    assert with_published_names(eurosat, "eurosat").class_names == ["Annual Crop Land", "River", "Sea or Lake"]
    ucf = image_list(list("ab"), ["ApplyEyeMakeup", "YoYo"])
    assert with_published_names(ucf, "ucf101").class_names == ["Apply_Eye_Makeup", "Yo_Yo"]
    with pytest.raises(ClipadaptError, match="Unknown data set with its own class names 'cifar'"):
        with_published_names(ucf, "cifar")


def test_published_names_of_real_folders_are_those_of_the_split(shared):
    folders = image_folder(shared / "data" / "caltech101" / "101_ObjectCategories")
    split = coop_split(shared / "data" / "coop-splits" / "split_zhou_Caltech101.json")
    assert set(with_published_names(folders, "caltech101").class_names) == set(split.train.class_names)
