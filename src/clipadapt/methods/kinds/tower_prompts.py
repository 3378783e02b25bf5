"""Learned vectors in both towers, at the input and before the first blocks, which several methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clipadapt.backbones import Backbone, Insertion
from clipadapt.methods.card import hyper
from clipadapt.methods.kinds.prompts import PromptLearner, PromptMethod
from clipadapt.nn.prompts import ClassPrompts, deep_vectors, split_words, visual_prompts


class DeepTexts(PromptLearner):
    """Vectors (n, Wt) for each of the first text blocks; words of `init` that are left over are not learned.

    `depth` blocks at most; those at the input start from the first `n_ctx` tokens of `init`, all others at random.
    """

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        context, words = split_words(backbone, of.init, of.n_ctx)
        self.textual = nn.ParameterList(deep_vectors(backbone, "text", of.n_ctx, self.text_depth(), context))
        self.prompts = ClassPrompts(backbone, class_names, of.n_ctx, words=words)

    def text_depth(self) -> int:
        """Text blocks with vectors of their own, at most all."""
        return self.of.depth

    def texts(self) -> Tensor:
        first, *deeper = self.textual
        return self.prompts.encode(first, deeper)  # (C, D)


class IndependentPrompts(DeepTexts):
    """And tokens (m, Wv) for each of the first blocks of the image tower."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        self.visual = nn.ParameterList(deep_vectors(backbone, "vision", of.n_visual, of.depth))

    def vision(self) -> list[Insertion]:
        first, *deeper = self.visual
        return visual_prompts(first, deeper)


@dataclass(kw_only=True)
class TowerPromptMethod(PromptMethod):
    """Base of the methods with independent vectors in both towers, which are trained on pixels."""

    n_ctx: int = hyper(4, "vectors in a text", low=1)
    n_visual: int = hyper(4, "tokens in an image", low=1)
    depth: int = hyper(9, "blocks with vectors of their own, in each tower at most all", low=1)
    init: str | None = hyper("a photo of a", "words the first n_ctx tokens of which start the vectors; None: random")
    batch_size: int = hyper(4, "images a step", low=1)
    min_scale: float = hyper(0.08, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)

    learner = IndependentPrompts
