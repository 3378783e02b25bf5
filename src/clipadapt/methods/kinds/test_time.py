"""Methods that adapt to each image while they predict, and leave no trace: the next image finds what the first one did.

Such a kind may join another one, which says what adapts: `class Tpt(TestTimeMethod, PromptMethod, Classifier)` takes a
few steps on the learned tokens of a prompt method, which start each image from the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipadapt.data.items import hash_bytes
from clipadapt.features.views import RandomView
from clipadapt.methods.base import Method
from clipadapt.methods.kinds.images import SeenImage, read_images
from clipadapt.training.loop import Run, seeded


@dataclass(kw_only=True)
class TestTimeMethod(Method):
    """Adapts inside `predict`: write `_adapted(views)`. `predict([a, b])` equals [predict(a), predict(b)].

    Its hyper-parameters have `views`, the number of views of an image, the plain one included, and `seed`.
    """

    __test__ = False  # for pytest: not a test, in spite of its name
    kind: ClassVar[str] = "test-time"
    head: ClassVar[None] = None  # logits take more than features
    min_scale: ClassVar[float] = 0.08  # least area of a random view, in (0, 1]

    def _train(self, learner: Any, support: Any, run: Run, **more: Any) -> None:
        """Nothing is learned before images are seen."""

    def _adapted(self, views: Tensor) -> Tensor:
        """Logits (C,) of an image by views (V, 3, H, W) of it, the first of which is plain; what adapts may change."""
        raise NotImplementedError

    def _views(self, image: SeenImage) -> Tensor:
        """(V, 3, H, W): the plain view and random crops, which depend on the image's pixels and the seed alone."""
        hyper: Any = self
        backbone, content = self._fitted("backbone_"), hash_bytes(image.image.tobytes())
        crops = (
            RandomView(number, hyper.seed, self.min_scale).of(image.image, content, backbone.image_size)
            for number in range(1, hyper.views)
        )
        return torch.stack([image.pixels, *map(backbone.preprocess, crops)]).to(backbone.device)

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """See `Classifier.image_logits`; each image is adapted to from where `fit` left the model."""
        hyper: Any = self
        backbone = self._model("give images to predict, not features")
        rows, kept = [torch.empty(0, len(hyper.class_names_))], []
        for block in read_images(backbone, images, on_error=on_error, progress=progress):
            for image in block:
                with self._without_trace(), seeded(hyper.seed):
                    rows.append(self._adapted(self._views(image)).detach().float().cpu()[None])
                kept.append(image.number)
        return torch.cat(rows), kept

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        """While it lasts, what adapts may be trained; afterwards it is as it was."""
        parameters = self._adaptable()
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                    parameter.grad = None
                    parameter.requires_grad_(False)

    def _adaptable(self) -> list[Tensor]:
        """The parameters that may change while an image is predicted: those of a joined prompt method's learner."""
        bound = getattr(self, "_bound", None)
        return [] if bound is None else list(bound.parameters())
