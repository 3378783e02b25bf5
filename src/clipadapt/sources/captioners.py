"""Sentences about images: image-to-text models of `transformers`, and a captioner without a model.

A captioner is any callable from a list of images to a list of as many sentences. Methods call it through `describe`,
which checks the answer and opens few images at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image

from clipadapt.backbones import Backbone
from clipadapt.backbones.families import first_line, load_tokenizer, quiet
from clipadapt.data import Item
from clipadapt.errors import BackboneError, ClipadaptError

OPEN = 64  # images in memory at a time
PHRASES = (
    "a close-up", "seen from afar", "seen from above", "seen from below", "cropped", "in the dark", "in bright light",
    "blurred", "in black and white", "one of many", "with a person", "outdoors", "indoors", "on a plain background",
    "in front of a cluttered background", "on grass", "on water", "in the snow", "in the sky", "on a road",
    "on a table", "a drawing", "a painting", "a toy",
)  # fmt: skip

Captioner = Callable[[list[Image.Image]], list[str]]


def describe(captioner: Captioner, items: Sequence[Item]) -> list[str]:
    """What `captioner` says of N images, checked.

    Raises:
        ClipadaptError: the answer is not N strings.
    """
    sentences: list[str] = []
    for start in range(0, len(items), OPEN):
        images = [item.open() for item in items[start : start + OPEN]]
        said = captioner(images)
        if not isinstance(said, list | tuple) or [type(sentence) for sentence in said] != [str] * len(images):
            raise ClipadaptError(f"A captioner must return one string per image, a list of {len(images)}.")
        sentences += said
    return sentences


def as_captioner(value: Any, backbone: Backbone) -> Captioner:
    """The captioner given by `value`.

    Args:
        value: "phrases", what `backbone` sees in an image; another string or a path, the hub id or folder of an
            `ImageToText` model; or a `Captioner`, which stays as it is.
        backbone: what "phrases" looks with, and where a model is put.

    Raises:
        ClipadaptError: it is something else.
    """
    if isinstance(value, str | os.PathLike):
        return Phrases(backbone) if value == Phrases.name else ImageToText(value, device=backbone.device)
    if callable(value) and not isinstance(value, type):
        return value
    raise ClipadaptError(
        f'A captioner is "phrases", a hub id or folder, or a callable [images] -> [sentences], not {value!r}.'
    )


@dataclass
class ImageToText:
    """A captioning model of `transformers` such as BLIP, GIT or a vision encoder with a text decoder.

    Args:
        source: a hub id such as "Salesforce/blip-image-captioning-base", or a folder written by transformers; models
            that need a chat prompt next to the image are not supported.
        device: where it runs.
        max_new_tokens: longest sentence, in the model's tokens.
        num_beams: of beam search; 1 takes the likeliest next token. Nothing is drawn at random.
        batch_size: images per call of the model.

    Raises:
        ClipadaptError: a number is below 1.
        BackboneError: when called, if the source cannot be loaded as an image-to-text model.
    """

    source: str | os.PathLike[str]
    device: str | torch.device = "cpu"
    max_new_tokens: int = 40
    num_beams: int = 3
    batch_size: int = 16

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.num_beams, self.batch_size) < 1:
            raise ClipadaptError("max_new_tokens, num_beams and batch_size of a captioner must be at least 1.")

    @property
    def name(self) -> str:
        """The hub id or folder."""
        return os.fspath(self.source)

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        """Model, image processor and tokenizer."""
        try:
            with quiet():
                model = transformers.AutoModelForImageTextToText.from_pretrained(self.name, dtype=torch.float32)
                processor = transformers.AutoImageProcessor.from_pretrained(self.name, backend="pil")
        except (OSError, ValueError, RuntimeError) as error:
            raise BackboneError(f"{self.name} cannot be loaded as a captioner: {first_line(error)}") from error
        return model.eval().requires_grad_(False).to(self.device), processor, load_tokenizer(self.name)

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """N images -> N sentences, without special tokens and outer spaces."""
        sentences: list[str] = []
        for start in range(0, len(images), self.batch_size):
            model, processor, tokenizer = self._parts
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


class Phrases:
    """A captioner without a model: of a list of phrases, the one that a backbone finds most similar to the image.

    Args:
        backbone: what looks.
        phrases: what it can say; as they are, they are also what is encoded.

    Raises:
        BackboneError: the backbone has no tokenizer.
    """

    name: ClassVar[str] = "phrases"

    def __init__(self, backbone: Backbone, phrases: Sequence[str] = PHRASES) -> None:
        if "texts" not in backbone.capabilities:
            raise BackboneError(f"Phrases needs texts, which {backbone.source} lacks; name another captioner.")
        self.backbone, self.phrases = backbone, list(phrases)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """N images -> N of the phrases."""
        if not images:
            return []
        pixels = torch.stack([self.backbone.preprocess(image) for image in images])
        similarity = self.backbone.encode_images(pixels) @ self._texts.T  # (N, P)
        return [self.phrases[best] for best in similarity.argmax(1).tolist()]

    @cached_property
    def _texts(self) -> torch.Tensor:
        return self.backbone.encode_texts(self.phrases)  # (P, D)
