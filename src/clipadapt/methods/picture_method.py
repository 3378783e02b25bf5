"""Base of the methods that are made from class names and look at each picture's pixels when they predict.

Such a method writes `_scores(backbone, pictures)`; what depends on the class names is rebuilt from them by `_names`, so
nothing but the names and hyper-parameters is kept in a saved model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipadapt.backbones import Backbone
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.data import Dataset, as_items
from clipadapt.errors import ArtifactError, ClipadaptError, DataError, unknown_name
from clipadapt.features import encode_classes
from clipadapt.features.progress import progress_bar
from clipadapt.methods.base import Method, Run

# What may stand as a detector, for the documentation of hyper-parameters.
DETECTOR = (
    '"saliency" (the backbone\'s own patches), the hub id or folder of a zero-shot detector, '
    "or a callable (picture, names) -> boxes, scores, names"
)

_BLOCK = 32  # pictures whose pixels are held at once


class Picture(NamedTuple):
    """One picture to be judged.

    number  its position in the list that was given
    image   RGB; of pixels that were given, the picture that they show
    pixels  (3, H, W) as the image tower takes them
    whole   the pixels show all of `image`, as they do where they were given
    """

    number: int
    image: Image.Image
    pixels: Tensor
    whole: bool


def shown(pixels: Tensor, preprocess: Callable[[Image.Image], Tensor]) -> Image.Image:
    """The picture that preprocessed pixels (3, H, W) show, in 8 bits: exact where they were made of such a one."""
    if not isinstance(preprocess, Preprocess):
        raise ClipadaptError("This backbone's transform cannot be inverted; give pictures instead of pixels.")
    mean, std = torch.tensor(preprocess.mean)[:, None, None], torch.tensor(preprocess.std)[:, None, None]
    values = ((pixels.cpu().float() * std + mean) / preprocess.rescale).round().clamp(0, 255)
    return Image.fromarray(values.permute(1, 2, 0).numpy().astype(np.uint8))


def opened(backbone: Backbone, images: Any, *, on_error: str, progress: bool) -> Iterator[list[Picture]]:
    """Pictures in any form that `Method.image_logits` takes, in blocks; on_error "skip" leaves out unreadable ones."""
    if on_error not in ("raise", "skip"):
        raise unknown_name("on_error", on_error, ("raise", "skip"))
    given = isinstance(images, Tensor)
    if given and (images.ndim != 4 or images.shape[1] != 3):
        raise ClipadaptError(f"Pixels must be (N, 3, H, W), but are {tuple(images.shape)}.")
    sources: Any = images if given else as_items(images)

    def read(index: int) -> Picture | DataError:
        try:
            if given:
                return Picture(index, shown(sources[index], backbone.preprocess), sources[index], True)
            image = sources[index].open()
            return Picture(index, image, backbone.preprocess(image), False)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool, progress_bar("Looking at pictures", len(sources), progress) as advance:
        for start in range(0, len(sources), _BLOCK):
            block = range(start, min(start + _BLOCK, len(sources)))
            pictures = []
            for result in pool.map(read, block):
                if isinstance(result, Picture):
                    pictures.append(result)
                elif on_error == "raise":
                    raise result
            if pictures:
                yield pictures
            advance(len(block))


@dataclass(kw_only=True)
class PictureMethod(Method):
    """See the module's docstring."""

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        self._restore(backbone)

    def _restore(self, backbone: Backbone | None) -> None:
        assert backbone is not None  # such a method is never fitted on features alone
        self.backbone_ = backbone
        self._names(backbone)

    def _names(self, backbone: Backbone) -> None:
        """Make what depends on the class names, in attributes without an underscore at the end."""
        self._texts = encode_classes(backbone, self.class_names_, self.templates)  # (C, D)

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """See `Method.image_logits`."""
        return self._each(images, self._scores, on_error, progress)

    def _each(
        self, images: Any, scores: Callable[[Backbone, list[Picture]], Tensor], on_error: str, progress: bool
    ) -> tuple[Tensor, list[int]]:
        """`scores` of all pictures, block by block, and which of them could be read."""
        backbone = self._fitted("backbone_")
        rows, kept = [torch.empty(0, len(self.class_names_))], []
        for pictures in opened(backbone, images, on_error=on_error, progress=progress):
            with torch.no_grad():
                rows.append(scores(backbone, pictures).float().cpu())
            kept += [picture.number for picture in pictures]
        return torch.cat(rows), kept

    def _scores(self, backbone: Backbone, pictures: list[Picture]) -> Tensor:
        """Logits (B, C) of some pictures, at least one."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> Path:
        """See `Method.save`; refuses a hyper-parameter that is a function, since it could not be found again."""
        for field in dataclasses.fields(self):
            if callable(getattr(self, field.name)):
                raise ArtifactError(
                    f"{self.card.key}: {field.name} is a function, which a saved model cannot keep; fit anew instead."
                )
        return super().save(folder)

    def _logits(self, images: Tensor) -> Tensor:
        raise ClipadaptError(f"{self.card.key} looks at pictures, not at features: use image_logits or predict.")


def encode(backbone: Backbone, pictures: list[Image.Image] | list[Tensor], batch_size: int = 64) -> Tensor:
    """Unit features (N, D) of pictures, or of pixels (3, H, W), on the CPU."""
    features = [torch.empty(0, backbone.dim)]
    for start in range(0, len(pictures), batch_size):
        batch = [p if isinstance(p, Tensor) else backbone.preprocess(p) for p in pictures[start : start + batch_size]]
        features.append(backbone.encode_images(torch.stack(batch)).float().cpu())
    return torch.cat(features)
