"""Detection: where in an image which things are."""

from __future__ import annotations

from typing import Any, ClassVar

from PIL import Image

from clipadapt.data import as_items
from clipadapt.errors import ClipadaptError
from clipadapt.methods.tasks.named_classes import NamedClasses
from clipadapt.metrics.detection import Boxes, average_precision_50


class Detector(NamedClasses):
    """Answers with boxes for each image: write `_boxes(image)`."""

    task: ClassVar[str] = "detector"

    def _boxes(self, image: Image.Image) -> Boxes:
        """The boxes of an RGB image, in its own pixels."""
        raise NotImplementedError

    def predict(self, images: Any) -> list[Boxes]:
        """The boxes of each image (paths, PIL, a data set), with labels into `class_names_` and scores."""
        self._model("it has no towers to look at images with")
        return [self._boxes(item.open()) for item in as_items(images)]

    def score(self, data: Any) -> float:
        """Average precision at an IoU of one half (AP50), in [0, 1], the mean over the classes that are present.

        `data` has `items`, `targets` (`Boxes`) and `class_names`, those of this model.
        """
        self._model("it has no towers to look at images with")
        if not len(data.items):
            raise ClipadaptError("score needs at least one image with its boxes.")
        if list(data.class_names) != self.class_names_:
            raise ClipadaptError(f"score needs boxes of the classes {self.class_names_}, in this order.")
        return average_precision_50(data.targets, self.predict(data.items), len(self.class_names_))
