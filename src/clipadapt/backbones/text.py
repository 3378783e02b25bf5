"""Cleaning of texts before a tokenizer sees them, as the original CLIP does it."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable

try:  # repairs mis-decoded text; the original CLIP uses it, and we do where it is installed
    from ftfy import fix_text
except ImportError:
    fix_text = None  # type: ignore[assignment]


def clean(text: str, special_tokens: Iterable[str] = ()) -> str:
    """Undo HTML entities (twice), repair and compose characters, drop special tokens written out, tidy the spaces.

    A user's text may contain "<|endoftext|>" literally; a tokenizer would take it for the end of the sentence.
    Only bracketed special tokens are dropped: some vocabularies pad with "!", which people also write.
    """
    if fix_text is not None:
        text = fix_text(text)
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)))
    marks = [re.escape(token) for token in special_tokens if token[:1] in "<[" and token[-1:] in ">]"]
    if marks:
        text = re.sub("|".join(marks), " ", text)  # a space, so that the rest cannot join to form another
    return " ".join(text.split())
