"""Segmentation: which class each pixel of an image shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from clipadapt.data import as_items
from clipadapt.errors import ClipadaptError
from clipadapt.methods.tasks.named_classes import NamedClasses
from clipadapt.metrics.segmentation import confusion, mean_iou


class Segmenter(NamedClasses):
    """Answers with one map of classes for each image: write `_maps(image)`."""

    task: ClassVar[str] = "segmenter"

    def _maps(self, image: Image.Image) -> Tensor:
        """Logits (C, H, W) of an RGB image, H and W its own height and width in pixels."""
        raise NotImplementedError

    def masks_proba(self, images: Any) -> list[np.ndarray]:
        """Class probabilities of images (paths, PIL, a data set): for each a float32 array (C, H, W)."""
        return [logits.softmax(dim=0).numpy() for logits in self._each(images)]

    def predict(self, images: Any) -> list[np.ndarray]:
        """The class of each pixel: for each image an int64 array (H, W) of indices into `class_names_`."""
        return [logits.argmax(dim=0).numpy() for logits in self._each(images)]

    def _each(self, images: Any) -> Iterator[Tensor]:
        self._model("it has no towers to look at images with")
        for item in as_items(images):
            yield self._maps(item.open()).detach().float().cpu()

    def score(self, data: Any) -> float:
        """Mean intersection over union in [0, 1] on images with true maps (H, W), over the whole set.

        `data` has `items`, `targets` (int arrays, 255 does not count) and `class_names`, those of this model.
        """
        self._model("it has no towers to look at images with")
        if not len(data.items):
            raise ClipadaptError("score needs at least one image with its map.")
        if list(data.class_names) != self.class_names_:
            raise ClipadaptError(f"score needs maps of the classes {self.class_names_}, in this order.")
        classes = len(self.class_names_)
        pairs = zip(data.targets, data.items, strict=True)
        return mean_iou(sum((confusion(true, self.predict([item])[0], classes) for true, item in pairs), np.array(0)))
