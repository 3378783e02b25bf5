"""Learned context vectors around the class names, which most prompt methods start from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from clipadapt.backbones import Backbone
from clipadapt.features import encode_classes
from clipadapt.methods.kinds.prompts import PromptLearner
from clipadapt.nn.prompts import ClassPrompts, first_context

PROMPTS = 4096  # images x classes that are encoded together when predicting; training takes the whole batch


class ContextLearner(PromptLearner):
    """One context for all classes (M, W), or one for each (C, M, W); `first` makes its start values."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        self.context = nn.Parameter(self.first())
        position = getattr(of, "position", "end")
        self.prompts = ClassPrompts(backbone, class_names, self.context.shape[-2], position=position)

    def first(self) -> Tensor:
        """Start values: the embeddings of the words `init`, or `n_ctx` random vectors where there are none."""
        return first_context(self.backbone, self.of.n_ctx, self.of.init)

    def texts(self) -> Tensor:
        return self.prompts.encode(self.context)  # (C, D)


class TaughtLearner(ContextLearner):
    """A context for all classes, and the zero-shot classifier of the method's `templates` to learn from."""

    @cached_property  # only training needs it
    def teacher(self) -> Tensor:
        """Unit features (C, D) of the classes' sentences."""
        return encode_classes(self.backbone, self.class_names, self.of.templates).to(self.backbone.device)


class ShiftedLearner(ContextLearner):
    """A context (M, W) that each image shifts: prompts, and so class features, are an image's own."""

    def texts(self) -> Tensor:
        """Nothing (C, 0): what the classes are depends on the image."""
        return self.context.new_empty(len(self.class_names), 0)

    def texts_for(self, shift: Tensor) -> Tensor:
        """Shifts (B, W) -> unit features of the classes for each image (B, C, D)."""
        return self.prompts.encode(self.context + shift[:, None, None])  # from (B, 1, M, W)

    def cosines(self, images: Tensor, shifts: Tensor) -> Tensor:
        """Unit features (B, D) and shifts (B, W) -> cosines with the classes (B, C)."""
        if len(images) == 0:
            return images.new_empty(0, len(self.class_names))
        together = len(images) if torch.is_grad_enabled() else max(1, PROMPTS // len(self.class_names))
        parts = zip(images.split(together), shifts.split(together), strict=True)
        return torch.cat([torch.einsum("bd,bcd->bc", part, self.texts_for(shift)) for part, shift in parts])
