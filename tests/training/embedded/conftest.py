"""A small corpus with drawn things and scenes, a dictionary, and a tiny model with a trunk."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.backbones.families import Pretrained
from clipadapt.backbones.trunk import TrunkClipModel
from clipadapt.data.corpus.pairs import SIZE, Corpus
from clipadapt.data.corpus.wordnet import WordNet
from tests.dictionary import write_dictionary
from tests.tiny import tiny

NAMES = ["dog", "crane", "star", "red apple"]


def line(name, kind="emoji", split="train", texts=None):
    fields = {"source": "noto", "name": name, "texts": texts or [name], "keywords": [], "other": []}
    return fields | {"split": split, "kind": kind}


@pytest.fixture(scope="package")
def corpus(tmp_path_factory):
    """Two drawings of each of NAMES, two scenes, and one drawing that is kept out of training."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [line(name, texts=[name, f"{name} face"]) for name in NAMES for _ in range(2)]
    lines += [line("a green rocket", "playground", texts=["a rocket", "a green rocket"]) for _ in range(2)]
    lines.append(line("hidden", split="heldout-name"))
    images = np.random.default_rng(0).integers(0, 256, (len(lines), SIZE, SIZE, 4), np.uint8)
    np.save(folder / "images.npy", images)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (folder / "corpus.json").write_text("{}")
    return Corpus.open(folder)


@pytest.fixture(scope="package")
def wordnet(tmp_path_factory):
    return WordNet(write_dictionary(tmp_path_factory.mktemp("wordnet")))


@pytest.fixture(scope="package")
def photos(tmp_path_factory):
    """Three photos of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    files = [folder / f"{number}.jpeg" for number in range(3)]
    rng = np.random.default_rng(1)
    for number, file in enumerate(files):
        pixels = rng.integers(0, 256, (40 + 10 * number, 70, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    return files


@pytest.fixture(scope="package")
def backbone():
    """Whose joint space is as wide as its patches, as in the embedded model."""
    plain = load_backbone(tiny("clip_trunk"))
    config = deepcopy(plain.model.config)
    config.projection_dim = config.vision_config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TrunkClipModel(config)
    return Backbone("tiny", Pretrained("clip_trunk", model, plain.processor, plain.tokenizer))
