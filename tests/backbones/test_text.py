"""Texts are cleaned as the original CLIP cleans them, before a tokenizer sees them."""

from __future__ import annotations

import pytest

from clipadapt.backbones import text
from clipadapt.backbones.text import clean

SPECIALS = ["<|startoftext|>", "<|endoftext|>", "[SEP]", "!"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),  # escaped twice
        ("cafe\u0301", "caf\u00e9"),  # composed
        ("  a \t photo\n of  it ", "a photo of it"),
        ("a <|endoftext|> b", "a b"),
        ("a &lt;|endoftext|&gt; b", "a b"),
        ("<|end<|endoftext|>oftext|>", "<|end oftext|>"),  # what is left does not join to a new one
        ("look here!", "look here!"),  # some vocabularies pad with it
        ("", ""),
    ],
)
def test_clean(raw, expected):
    assert clean(raw, SPECIALS) == expected


def test_mojibake_is_repaired_where_ftfy_is_installed(monkeypatch):
    monkeypatch.setattr(text, "fix_text", lambda broken: broken.replace("â€™", "'"))
    assert clean("itâ€™s") == "it's"


def test_special_tokens_in_a_text_do_not_end_it(backbone):
    end = backbone.tokenizer.eos_token
    plain = backbone.tokenize(["a photo of a cat"])
    assert backbone.tokenize([f"a photo {end} of a cat"]).tolist() == plain.tolist()


def test_entities_reach_the_tokenizer_decoded(clip):
    assert clip.tokenize(["cat &amp; dog"]).tolist() == clip.tokenize(["cat & dog"]).tolist()
