"""Pairs of items and captions: one caption or several, images or texts."""

from __future__ import annotations

import pytest
from PIL import Image

from clipadapt.data import Pairs, image_pairs
from clipadapt.errors import DataError

RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))


def test_images_with_one_caption_or_several():
    pairs = image_pairs([(RED, "a red star"), (BLUE, ["a star", "a red star"])], name="stars")
    assert len(pairs) == 2
    assert pairs.captions == [("a red star",), ("a star", "a red star")]
    assert pairs.texts == ["a red star", "a star"]
    assert [item.open().getpixel((0, 0)) for item in pairs.items] == [(255, 0, 0), (0, 0, 255)]
    assert repr(pairs) == "Pairs('stars': 2 images, 2 captions)"
    chosen = pairs.select([1, 0, 1])
    assert [item.name for item in chosen.items] == ["picture 1", "picture 0", "picture 1"]
    assert (chosen.captions[0], chosen.name) == (("a star", "a red star"), "stars")


def test_text_text_pairs():
    pairs = Pairs(["un chat", "un chien"], [("a cat", "one cat"), ("a dog",)], "french")
    assert repr(pairs) == "Pairs('french': 2 texts, 3 captions)"
    assert pairs.select([1]).items == ["un chien"]


@pytest.mark.parametrize("captions", [" ", ["a star", ""], [], 3, [None]])
def test_what_is_no_caption_is_named(captions):
    with pytest.raises(DataError, match="stars: pair 1 is not an image with a caption"):
        image_pairs([(RED, "a star"), (BLUE, captions)], name="stars")


def test_lists_that_do_not_fit_are_named():
    with pytest.raises(DataError, match="french: 2 items but captions of 1"):
        Pairs(["un chat", "un chien"], [("a cat",)], "french")
    with pytest.raises(DataError, match="item 1 needs captions"):
        Pairs(["un chat", "un chien"], [("a cat",), ()])
    with pytest.raises(DataError, match="holds no pair"):
        image_pairs([])
