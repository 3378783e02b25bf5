"""Sentences about pictures, by an image-to-text model of transformers; whatever else captions can take its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from PIL import Image

from clipadapt.backbones.families import first_line, load_tokenizer, quiet
from clipadapt.data import Item
from clipadapt.errors import BackboneError, ClipadaptError

OPEN = 64  # pictures in memory at a time
Caption = Callable[[list[Image.Image]], list[str]]


class Captioner:
    """Pictures to sentences with a captioning model such as BLIP, GIT or a vision encoder with a text decoder.

    source          a hub id such as "Salesforce/blip-image-captioning-base", or a folder written by transformers;
                    models that need a chat prompt beside the picture are not for this
    device          where its weights go
    max_new_tokens  longest sentence, in the model's tokens
    num_beams       of beam search; 1 takes the likeliest next token. Nothing is drawn at random.
    batch_size      pictures per call of the model

    The model is loaded when the first picture comes. It is called with PIL pictures and gives one string for each.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        max_new_tokens: int = 40,
        num_beams: int = 3,
        batch_size: int = 16,
    ) -> None:
        if min(max_new_tokens, num_beams, batch_size) < 1:
            raise ClipadaptError("max_new_tokens, num_beams and batch_size of a Captioner must be at least 1.")
        self.name = os.fspath(source)
        self.device = device
        self.max_new_tokens, self.num_beams, self.batch_size = max_new_tokens, num_beams, batch_size
        self._parts: tuple[Any, Any, Any] | None = None

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """N pictures -> N sentences, without special tokens and outer spaces."""
        sentences: list[str] = []
        for start in range(0, len(images), self.batch_size):
            model, processor, tokenizer = self._loaded()
            batch = [image.convert("RGB") for image in images[start : start + self.batch_size]]
            pixels = processor(images=batch, return_tensors="pt")["pixel_values"].to(self.device)  # (B, 3, H, W)
            with torch.no_grad():
                ids = model.generate(
                    pixel_values=pixels,
                    max_new_tokens=self.max_new_tokens,
                    num_beams=self.num_beams,
                    do_sample=False,
                )
            sentences += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return sentences

    def _loaded(self) -> tuple[Any, Any, Any]:
        if self._parts is None:
            try:
                with quiet():
                    model = transformers.AutoModelForImageTextToText.from_pretrained(self.name, dtype=torch.float32)
                    processor = transformers.AutoImageProcessor.from_pretrained(self.name, backend="pil")
            except (OSError, ValueError, RuntimeError) as error:
                raise BackboneError(
                    f"{self.name} is no image-to-text model that transformers can load: {first_line(error)}"
                ) from error
            self._parts = model.eval().requires_grad_(False).to(self.device), processor, load_tokenizer(self.name)
        return self._parts


def captioner(value: Any) -> Caption:
    """A captioner as it is, or the `Captioner` that a folder or hub id names."""
    if callable(value):
        return value
    if isinstance(value, str | os.PathLike):
        return Captioner(value)
    raise ClipadaptError(
        f"A captioner is a function from PIL pictures to sentences, a folder or a hub id, not {value!r}."
    )


def describe(value: Any, items: Sequence[Item]) -> list[str]:
    """What the captioner `value` says of N pictures, of which a few are open at a time; refuses all but N strings."""
    caption, sentences = captioner(value), []
    for start in range(0, len(items), OPEN):
        images = [item.open() for item in items[start : start + OPEN]]
        said = caption(images)
        if not isinstance(said, list | tuple) or [type(sentence) for sentence in said] != [str] * len(images):
            raise ClipadaptError(f"A captioner must give a list of {len(images)} strings for as many pictures.")
        sentences += said
    return sentences
