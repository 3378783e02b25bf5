"""Methods that see an image's pixels when they predict: they are made from class names, and crop, mask or part images.

Such a method writes `_scores(backbone, images)`; what depends on the class names is rebuilt from them by `_name`, so
that a saved model keeps nothing but names and hyper-parameters. One that learns writes `_fit`, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.data import as_items
from clipadapt.errors import ArtifactError, ClipadaptError, DataError, unknown_name
from clipadapt.features.progress import progress_bar
from clipadapt.methods.base import Method
from clipadapt.methods.training_data import TrainingData
from clipadapt.training.loop import Run

# What a detector may be, for the documentation of hyper-parameters.
DETECTOR = (
    '"saliency" (the backbone\'s own patches), the hub id or folder of a zero-shot detector, '
    "or a callable (image, names) -> boxes, scores, names"
)

_BLOCK = 32  # images whose pixels are held at once


class SeenImage(NamedTuple):
    """One image to be judged.

    Attributes:
        number: its position in the list that was given.
        image: RGB; of pixels that were given, the image that they show.
        pixels: (3, H, W) as the image tower takes them.
        whole: whether the pixels show all of `image`, as they do where they were given.
    """

    number: int
    image: Image.Image
    pixels: Tensor
    whole: bool


def image_of(pixels: Tensor, preprocess: Callable[[Image.Image], Tensor]) -> Image.Image:
    """The image that preprocessed pixels (3, H, W) show, in 8 bits: exact where they were made of such a one."""
    if not isinstance(preprocess, Preprocess):
        raise ClipadaptError("This backbone's transform cannot be inverted; give images instead of pixels.")
    mean, std = torch.tensor(preprocess.mean)[:, None, None], torch.tensor(preprocess.std)[:, None, None]
    values = ((pixels.cpu().float() * std + mean) / preprocess.rescale).round().clamp(0, 255)
    return Image.fromarray(values.permute(1, 2, 0).numpy().astype(np.uint8))


def read_images(backbone: Backbone, images: Any, *, on_error: str, progress: bool) -> Iterator[list[SeenImage]]:
    """Images in any form that `image_logits` takes, in blocks; on_error "skip" leaves out unreadable ones."""
    if on_error not in ("raise", "skip"):
        raise unknown_name("on_error", on_error, ("raise", "skip"))
    given = isinstance(images, Tensor)
    if given and (images.ndim != 4 or images.shape[1] != 3):
        raise ClipadaptError(f"Pixels must be (N, 3, H, W), but are {tuple(images.shape)}.")
    sources: Any = images if given else as_items(images)

    def read(index: int) -> SeenImage | DataError:
        try:
            if given:
                return SeenImage(index, image_of(sources[index], backbone.preprocess), sources[index], True)
            image = sources[index].open()
            return SeenImage(index, image, backbone.preprocess(image), False)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool, progress_bar("Looking at images", len(sources), progress) as advance:
        for start in range(0, len(sources), _BLOCK):
            block = range(start, min(start + _BLOCK, len(sources)))
            seen = []
            for result in pool.map(read, block):
                if isinstance(result, SeenImage):
                    seen.append(result)
                elif on_error == "raise":
                    raise result
            if seen:
                yield seen
            advance(len(block))


@dataclass(kw_only=True)
class ImageMethod(Method):
    """A method that sees pixels when it predicts; see the module's docstring."""

    kind: ClassVar[str] = "images"
    head: ClassVar[None] = None  # logits take more than features

    def _learn(self, model: Backbone, data: TrainingData, run: Run) -> None:
        self._fit(model, data, run)
        self._restore(model)

    def _fit(self, backbone: Backbone, data: TrainingData, run: Run) -> None:
        """What is learned of labelled images; by default nothing."""

    def _restore(self, model: Any) -> None:
        self.backbone_ = model
        self._name(model)

    def _name(self, backbone: Backbone) -> None:
        """Make what depends on the class names, in attributes without an underscore at the end."""
        self._texts = self._class_texts(backbone)  # (C, D)

    def _reclassify(self, model: Any) -> None:
        self._restore(model)

    def _scores(self, backbone: Backbone, images: list[SeenImage]) -> Tensor:
        """Logits (B, C) of some images, at least one."""
        raise NotImplementedError

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """See `Classifier.image_logits`."""
        return self._each(images, self._scores, on_error, progress)

    def _each(
        self, images: Any, scores: Callable[[Backbone, list[SeenImage]], Tensor], on_error: str, progress: bool
    ) -> tuple[Tensor, list[int]]:
        """`scores` of all images, block by block, and which of them could be read."""
        backbone = self._fitted("backbone_")
        rows, kept = [torch.empty(0, len(self.class_names_))], []
        for seen in read_images(backbone, images, on_error=on_error, progress=progress):
            with torch.no_grad():
                rows.append(scores(backbone, seen).float().cpu())
            kept += [one.number for one in seen]
        return torch.cat(rows), kept

    def save(self, folder: str | Path) -> Path:
        """See `Method.save`; refuses a hyper-parameter that is a function, since it could not be found again."""
        for field in dataclasses.fields(self):
            if callable(getattr(self, field.name)):
                raise ArtifactError(
                    f"{self.card.key}: {field.name} is a function, which a saved model cannot keep; refit instead."
                )
        return super().save(folder)


def encode(backbone: Backbone, images: list[Image.Image] | list[Tensor], batch_size: int = 64) -> Tensor:
    """Unit features (N, D) of images, or of pixels (3, H, W), on the CPU."""
    features = [torch.empty(0, backbone.dim)]
    for start in range(0, len(images), batch_size):
        batch = [p if isinstance(p, Tensor) else backbone.preprocess(p) for p in images[start : start + batch_size]]
        features.append(backbone.encode_images(torch.stack(batch)).float().cpu())
    return torch.cat(features)
