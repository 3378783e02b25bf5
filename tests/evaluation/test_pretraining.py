"""The evaluations during pretraining, on models that know everything or nothing."""

import numpy as np
import pytest
import torch

from clipadapt.backbones.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from clipadapt.data.corpus.pairs import Corpus
from clipadapt.evaluation.studies.pretraining import corpus_hooks

COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0),
    "yellow": (255, 255, 0),
}  # fmt: skip
TRAINED = ("red", "green", "blue")


class WordIds:
    """A tokenizer that gives the position of the colour that a text names."""

    def __call__(self, texts, **_):
        found = [next((i for i, name in enumerate(COLOURS) if name in text), 0) for text in texts]
        return {"input_ids": torch.tensor(found)[:, None]}


class ColourBackbone:
    """A backbone whose features are mean colours; `shift` confuses every text with the next one."""

    preprocess = Preprocess()
    tokenizer = WordIds()
    context_length = 8

    def __init__(self, shift=0):
        self.shift = shift

    def encode_images(self, pixels, normalize):
        assert not normalize
        return pixels.mean((2, 3))

    def encode_tokens(self, ids, normalize):
        assert not normalize
        colours = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)[(ids[:, 0] + self.shift) % len(COLOURS)]
        return (colours / 255 - torch.tensor(OPENAI_MEAN)) / torch.tensor(OPENAI_STD)


@pytest.fixture(scope="module")
def hooks(tmp_path_factory):
    images = np.full((len(COLOURS) + 1, 64, 64, 4), 255, np.uint8)
    pairs = []
    for index, (name, colour) in enumerate(COLOURS.items()):
        images[index, ..., :3] = colour
        split = "heldout-style" if name in TRAINED else "heldout-name"
        pairs.append({"source": "fluent-emoji-flat", "name": name, "texts": [name], "split": split, "kind": "emoji"})
    # A second image of the first name, in another skin tone and the wrong colour, must not be judged.
    pairs.append(pairs[0] | {"texts": ["red", "red, dark skin tone"]})
    corpus = Corpus(tmp_path_factory.mktemp("corpus"), images, pairs)
    return corpus_hooks(corpus, 16, playground_per_kind=1)


def test_perfect_model(hooks):
    style = hooks["heldout_style"](ColourBackbone())
    assert style == {"top1": 1, "top1_ensemble": 1, "top1_new_names": 1, "names": 6, "new_names": 3}
    assert hooks["retrieval"](ColourBackbone())["text_to_image"] > 0.8  # but for the wrong red, if it was the one drawn


def test_confused_model(hooks):
    style = hooks["heldout_style"](ColourBackbone(shift=1))
    assert style["top1"] == style["top1_ensemble"] == 0
    assert hooks["retrieval"](ColourBackbone(shift=1))["text_to_image"] < 0.5


def test_playground_tells_kinds_apart_from_chance_only(hooks):
    figures = hooks["playground"](ColourBackbone())
    assert figures["new_kinds"] == 6
    assert figures["top1"] < 0.1  # colours say nothing about kinds, and every text is the same to this model
    assert {"top1_new_kinds", "top1_new_style", "kinds"} <= set(figures)
