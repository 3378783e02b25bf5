"""A saved model survives interruptions, and whatever is wrong with it is one clear sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipadapt
from clipadapt.backbones import load_backbone
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.methods import create
from tests.tiny import tiny_clip, tiny_siglip


@pytest.fixture
def saved(tmp_path) -> Path:
    model = create("zero-shot").fit(load_backbone(tiny_clip()), class_names=["red", "green", "blue"])
    return model.save(tmp_path / "model")


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_is_small_and_plain(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["method"] == "zero-shot"
    assert config["learned"]["class_names_"] == ["red", "green", "blue"]
    assert config["backbone"]["source"] == str(tiny_clip())
    assert sum(path.stat().st_size for path in saved.iterdir()) < 4000


def test_loads_the_backbone_it_names(saved):
    assert clipadapt.load(saved).backbone_.fingerprint == load_backbone(tiny_clip()).fingerprint


def test_another_backbone_is_refused(saved):
    with pytest.raises(ArtifactError, match="is another one: its weights, preprocessing or tokenizer differ"):
        clipadapt.load(saved, load_backbone(tiny_siglip()))


def test_a_missing_backbone_names_itself(saved):
    edit(saved, lambda c: c["backbone"].update(source="/no/such/backbone"))
    with pytest.raises(ClipadaptError, match="/no/such/backbone"):
        clipadapt.load(saved)


def test_missing_folder_config_or_weights(saved, tmp_path):
    with pytest.raises(ArtifactError, match="is not a saved model"):
        clipadapt.load(tmp_path / "nowhere")
    next(saved.glob("*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match=r"is incomplete: weights-.* is missing"):
        clipadapt.load(saved)


def test_a_flipped_byte_is_found(saved):
    path = next(saved.glob("*.safetensors"))
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(bytes(blob))
    with pytest.raises(ArtifactError, match="damaged: its checksum differs"):
        clipadapt.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"method": "zero-shot"}', "\x00\x01"])
def test_a_damaged_config_is_found(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json is damaged"):
        clipadapt.load(saved)


def test_a_newer_format_asks_for_an_upgrade(saved):
    edit(saved, lambda c: c.update(format=99, clipadapt="9.9.9"))
    with pytest.raises(ArtifactError, match=r"saved by clipadapt 9\.9\.9 in format 99.*upgrade"):
        clipadapt.load(saved)


def test_an_unknown_method_names_near_ones(saved):
    edit(saved, lambda c: c.update(method="zero-shott"))
    with pytest.raises(ClipadaptError, match="did you mean 'zero-shot'"):
        clipadapt.load(saved)


def test_other_peoples_files_are_left_alone(saved, tmp_path):
    model = clipadapt.load(saved)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds other files and no clipadapt model"):
        model.save(tmp_path / "thesis")
    (tmp_path / "towers").mkdir()
    (tmp_path / "towers" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ArtifactError, match="holds other files and no clipadapt model"):
        model.save(tmp_path / "towers")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        model.save(tmp_path / "file")
    with pytest.raises(ClipadaptError, match="not fitted"):
        create("zero-shot").save(tmp_path / "unfitted")


def test_saving_again_replaces_the_weights(saved):
    other = create("zero-shot").fit(load_backbone(tiny_clip()), class_names=["cat", "dog"])
    other.save(saved)
    assert clipadapt.load(saved).class_names_ == ["cat", "dog"]
    assert len(list(saved.glob("*"))) == 2


# A process that starts others, which save one model after the other until they are killed.
SAVER = """
import os, sys, torch
torch.set_num_threads(1)
from clipadapt.methods import create
heads = [create("zero-shot").fit_features(torch.empty(0, 512), [], torch.randn(800, 512)) for _ in range(2)]
for _ in sys.stdin:
    child = os.fork()
    while child == 0:
        for head in heads:
            head.save(sys.argv[1])
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def test_killed_while_saving_leaves_a_whole_model(tmp_path):
    """kill -9 at whatever moment: what is there afterwards loads, as one of the two models that were being saved."""
    folder = tmp_path / "model"
    command = [sys.executable, "-c", SAVER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for delay in (0.01, 0.05, 0.13, 0.22):
            process.stdin.write("save\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            while not (folder / "config.json").exists():
                time.sleep(0.002)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            assert clipadapt.load(folder).logits(np.zeros((1, 512))).shape == (1, 800)
        process.stdin.close()
    create("zero-shot").fit_features(torch.empty(0, 4), [], torch.eye(4)).save(folder)
    assert clipadapt.load(folder).dim_ == 4


def test_scores_by_class_name(saved):
    """A data set whose classes come in another order is judged by their names; unknown classes are named."""
    model = clipadapt.load(saved)
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    names = [model.class_names_[i] for i in model.predict(images)]
    classes = sorted(set(names))
    data = clipadapt.image_list(images, [classes.index(name) for name in names], classes)
    assert model.score(data) == 1.0
    with pytest.raises(ClipadaptError, match=r"'gren'.*'green'"):
        model.score(clipadapt.image_list(images, [0, 0, 0], ["gren", "blue"]))
