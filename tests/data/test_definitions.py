"""Definitions of public data sets, read from miniature copies of their published layouts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from clipadapt.cli.app import app
from clipadapt.data.definitions.definition import LAYOUTS, check, definition, definitions, load
from clipadapt.errors import ClipadaptError, DataError


def image(path: Path, colour: str = "red") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return str(path)


def written(folder: Path, **fields) -> Path:
    file = folder / "mine.yaml"
    file.write_text(json.dumps({"name": "mine", "title": "Mine", **fields}))  # JSON is YAML
    return file


def counts(split):
    return [len(split.train), len(split.val), len(split.test)]


def test_no_module_of_data_needs_torch():
    code = (
        "import sys, pkgutil, importlib, clipadapt.data as data\n"
        "for module in pkgutil.walk_packages(data.__path__, 'clipadapt.data.'): importlib.import_module(module.name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", definitions())
def test_shipped_ones_are_whole(name):
    what = definition(name)
    assert what.name == name
    assert what.title
    assert what.licence != "not stated" or what.source
    assert what.source or what.generated
    assert what.layout in LAYOUTS
    assert what.classes
    if what.generated:
        assert check(what) == []
    else:
        (problem,) = check(what, "nowhere")
        assert "lacks" in problem
        assert "needs files on disk" in check(what)[0]


def test_the_eleven_and_the_imagenet_family_are_there():
    eleven = {"imagenet", "caltech101", "pets", "cars", "flowers102", "food101", "aircraft", "sun397", "dtd"}
    eleven |= {"eurosat", "ucf101"}
    assert eleven | {"imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r"} <= set(definitions())


def test_split_file_and_what_is_missing(tmp_path):
    rows = {part: [[f"{part}.png", 0, "ant"], [f"{part}2.png", 1, "bee"]] for part in ("train", "val", "test")}
    (tmp_path / "split.json").write_text(json.dumps(rows))
    for part in rows:
        image(tmp_path / "pics" / f"{part}.png")
        image(tmp_path / "pics" / f"{part}2.png")
    digest = hashlib.sha256((tmp_path / "split.json").read_bytes()).hexdigest()
    fields = {"layout": "split-file", "places": {"split": ["no.json", "split.json"], "images": "pics"}}
    whole = written(tmp_path, **fields, classes=2, counts={"train": 2}, sha256={"split": digest[:8]})
    assert check(whole, tmp_path) == []
    assert counts(load(whole, tmp_path).split) == [2, 2, 2]
    (tmp_path / "pics" / "val.png").unlink()
    wrong = written(tmp_path, **fields, classes=3, counts={"train": 5}, sha256={"split": "00000000"})
    problems = check(wrong, tmp_path)
    assert len(problems) == 4
    assert "another version" in problems[0]
    assert "2 classes here, not 3" in problems[1]
    assert "mine train has 2 images here, not 5" in problems[2]
    assert "1 of 6 images are missing" in problems[3]
    assert "val.png" in problems[3]


def test_aircraft(tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "variants.txt").write_text("707-320\nA380\n")
    for part in ("train", "val", "test"):
        (lists / f"images_variant_{part}.txt").write_text("001 A380\n002 707-320\n")
    file = written(tmp_path, layout="aircraft", places={"lists": "lists", "images": "lists"})
    split = load(file, tmp_path).split
    assert split.test.class_names == ["707-320", "A380"]
    assert split.test.labels == [1, 0]
    assert split.test.paths[0].endswith("lists/001.jpg")
    (lists / "images_variant_val.txt").write_text("001 A999\n")
    with pytest.raises(DataError, match="A999"):
        load(file, tmp_path)


def test_imagenet_and_its_variants(tmp_path):
    (tmp_path / "classnames.txt").write_text("n01 tench\nn02 great white shark\nn03 crane\n")
    for part, n in (("train", 2), ("val", 1)):
        for synset in ("n01", "n02", "n03"):
            for i in range(n):
                image(tmp_path / "images" / part / synset / f"{i}.png")
    file = written(tmp_path, layout="imagenet", places={"images": "images", "classnames": "classnames.txt"})
    split = load(file, tmp_path).split
    assert split.train.class_names == ["tench", "great white shark", "crane"]
    assert counts(split) == [6, 3, 3]
    assert split.val.paths == split.test.paths

    image(tmp_path / "a" / "n03" / "x.png")
    image(tmp_path / "a" / "n01" / "y.png")
    variant = {"layout": "imagenet-variant", "places": {"images": "a", "classnames": "classnames.txt"}}
    test = load(written(tmp_path, **variant), tmp_path).split.test
    assert (test.class_names, test.labels) == (["tench", "crane"], [0, 1])
    image(tmp_path / "v2" / "2" / "x.png")
    variant["places"]["images"] = "v2"
    numbered = load(written(tmp_path, **variant, settings={"numbered": True}), tmp_path).split.test
    assert numbered.class_names == ["crane"]
    (tmp_path / "classnames.txt").write_text("n01\n")
    with pytest.raises(DataError, match="must have lines such as"):
        load(file, tmp_path)


def test_folders_and_domains(tmp_path):
    for domain in ("art", "photo"):
        for name in ("cat", "dog"):
            for i in range(10):
                image(tmp_path / "pacs" / domain / name / f"{i}.png")
    plain = load(written(tmp_path, layout="folders", places={"images": "pacs/art"}), tmp_path).split
    assert counts(plain) == [10, 4, 6]
    split = load(written(tmp_path, layout="domain-folders", places={"images": "pacs"}), tmp_path).split
    assert counts(split) == [20, 8, 12]
    assert set(split.train.domains) == {"art", "photo"}
    assert split.train.class_names == ["cat", "dog"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ClipadaptError, match="caltech101"):
        definition("caltech")
    for fields, says in (
        ({"layout": "foldres"}, "folders"),
        ({"layout": "digits", "clases": 3}, "classes"),
        ({}, "lacks its layout"),
    ):
        with pytest.raises(ClipadaptError, match=says):
            definition(written(tmp_path, **fields))
    with pytest.raises(ClipadaptError, match="encoder of whu-rs19"):
        load("whu-rs19", tmp_path, "clip_vit-b-16")


def test_the_command(tmp_path):
    run = CliRunner().invoke
    assert "caltech101" in run(app, ["data", "list"]).stdout
    assert {d["name"] for d in json.loads(run(app, ["data", "list", "--json"]).stdout)} == set(definitions())
    good = run(app, ["data", "check", "digits"])
    assert good.exit_code == 0
    assert "train 899" in good.stdout
    bad = run(app, ["data", "check", "pets", str(tmp_path)])
    assert bad.exit_code == 1
    assert "split_zhou_OxfordPets.json" in bad.stdout.replace("\n", "")


def test_the_playground_draws_other_images_from_other_seeds(tmp_path):
    fields = {"layout": "playground", "settings": {"kinds": ["circle", "car"], "train": 3, "val": 1, "test": 2}}
    usual = load(definition(written(tmp_path, **fields)))
    fields["settings"]["seeds"] = {"test": 12}
    other = load(definition(written(tmp_path, **fields)))
    assert [i.digest() for i in other.split.train.items] == [i.digest() for i in usual.split.train.items]
    assert not {i.digest() for i in other.split.test.items} & {i.digest() for i in usual.split.test.items}
    assert other.split.test.labels == usual.split.test.labels
