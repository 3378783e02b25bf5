"""Image generation: images for prompts, or changed images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image

from clipadapt.errors import ClipadaptError
from clipadapt.methods.base import Method


class ImageGenerator(Method):
    """Answers with one image for each prompt or image: write `_image(given, seed)` and, for a score, `_measure`."""

    task: ClassVar[str] = "image-generator"

    def _image(self, given: Any, seed: int) -> Image.Image:
        """The image for one prompt (a string) or one image; a function of these and the seed."""
        raise NotImplementedError

    def generate(self, given: Sequence[Any], *, seed: int = 1) -> list[Image.Image]:
        """One RGB image for each prompt or image of `given`; the n-th one is drawn from the seed and n."""
        self._model("it has no towers to guide with")
        if isinstance(given, str | Image.Image):
            raise ClipadaptError("generate takes a list of prompts or images; put the one into a list.")
        return [self._image(one, 1_000_003 * seed + number).convert("RGB") for number, one in enumerate(given)]

    def _measure(self, given: Sequence[Any], made: list[Image.Image]) -> float:
        """The measure of the method's paper, of what was given and what was made of it."""
        raise NotImplementedError

    def score(self, given: Sequence[Any], *, seed: int = 1) -> float:
        """The measure of the method's paper on what it makes of these prompts or images."""
        return self._measure(given, self.generate(given, seed=seed))
