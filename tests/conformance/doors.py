"""One trivial method of each task that no shipped method has yet; importing this module registers them for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipadapt.backbones import Backbone
from clipadapt.data import Item
from clipadapt.methods import create, method
from clipadapt.methods.tasks.detection import Detector
from clipadapt.methods.tasks.image_generation import ImageGenerator
from clipadapt.methods.tasks.retrieval import Retriever
from clipadapt.methods.tasks.segmentation import Segmenter
from clipadapt.methods.tasks.text_generation import TextGenerator
from clipadapt.metrics.detection import Boxes


@dataclass(frozen=True)
class Labelled:
    """Items with targets of any kind, as later readers give them."""

    items: list[Item]
    targets: list[Any]
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.items)


def image(bright: bool) -> Image.Image:
    """A dark image of 6 x 10 pixels, with a bright box in it or without."""
    pixels = np.full((6, 10, 3), 20, np.uint8)
    if bright:
        pixels[1:4, 2:9] = 230
    return Image.fromarray(pixels)


def fitted(keys: list[str], backbone: Backbone) -> dict[str, Any]:
    """The methods fitted on two class names."""
    return {key: create(key).fit(backbone, class_names=["dark", "bright"]) for key in keys}


@method("test-segmenter", title="Bright and dark", family="tests", trains="", signal="none")
class Brightness(Segmenter):
    """The first class where a pixel is dark, the second where it is bright."""

    def _maps(self, image):
        grey = torch.from_numpy(np.asarray(image.convert("L"), np.float32)) / 255
        return torch.stack([1 - grey, grey, *[torch.zeros_like(grey)] * (len(self.class_names_) - 2)])


@method("test-detector", title="The bright box", family="tests", trains="", signal="none")
class BrightBox(Detector):
    """One box around everything bright."""

    def _boxes(self, image):
        left, top, right, bottom = image.convert("L").point(lambda v: 255 * (v > 127)).getbbox() or (0, 0, 1, 1)
        return Boxes(np.array([[left, top, right, bottom]], float), np.array([0]), np.array([1.0]))


@method("test-retriever", title="Plain towers", family="tests", trains="", signal="none")
class PlainTowers(Retriever):
    """The towers as they are."""


@method("test-text-generator", title="Says what it sees", family="tests", trains="", signal="none")
class Says(TextGenerator):
    """Whether an image is bright or dark."""

    def _text(self, item):
        return "bright" if np.asarray(item.open()).mean() > 127 else "dark"


@method("test-image-generator", title="Noise", family="tests", trains="", signal="none")
class Noise(ImageGenerator):
    """Noise, whatever is asked for."""

    def _image(self, given, seed):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))

    def _measure(self, given, made):
        return float(np.mean([np.asarray(image).mean() for image in made])) / 255
