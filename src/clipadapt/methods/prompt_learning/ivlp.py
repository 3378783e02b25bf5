"""IVLP: learned vectors in both towers, at the input and before the first blocks, independent of each other.

    t_c = text(start, v_1 .. v_n, {left words}, NAME_c, ".", end)    v replaced before blocks 1 .. J-1 by others
    x = image(patches, p_1 .. p_m)                                   p replaced likewise        min CE(s x t', y)

The baseline "independent V-L prompting" of Khattak et al., "MaPLe: Multi-modal Prompt Learning" (arXiv 2210.03117) and
of PromptSRC (arXiv 2307.06948); abstracts were read, and for every detail the official repository
muzairkhattak/multimodal-prompt-learning: 2 + 2 vectors, depth 12, the text's at the input started from "a photo" while
"of a" stays, all others from N(0, 0.02); SGD 3.5e-3, 5 epochs, batch 4, random crops (0.08-1) with flips. PromptSRC's
repository has 4 + 4 vectors, depth 9, SGD 2.5e-3 and 20 epochs, which its table reports. The depth of each tower is
min(depth, its blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from clipadapt.backbones import Backbone, Insertion
from clipadapt.methods.base import Card, hyper
from clipadapt.methods.prompt_method import PromptLearner, PromptMethod
from clipadapt.methods.registry import register
from clipadapt.nn.prompts import ClassPrompts, deep_vectors, split_words, visual_prompts


class DeepTexts(PromptLearner):
    """Vectors (n, Wt) for each of the first text blocks; `words` between them and the name are not learned."""

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], textual: Sequence[Tensor], words: str = ""
    ) -> None:
        super().__init__(backbone, class_names)
        self.textual = nn.ParameterList(textual)
        self.prompts = ClassPrompts(backbone, class_names, len(textual[0]), words=words)

    def texts(self) -> Tensor:
        first, *deeper = self.textual
        return self.prompts.encode(first, deeper)  # (C, D)


class IndependentPrompts(DeepTexts):
    """And tokens (m, Wv) for each of the first blocks of the image tower."""

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        textual: Sequence[Tensor],
        visual: Sequence[Tensor],
        words: str = "",
    ) -> None:
        super().__init__(backbone, class_names, textual, words)
        self.visual = nn.ParameterList(visual)

    def vision(self) -> list[Insertion]:
        first, *deeper = self.visual
        return visual_prompts(first, deeper)


@register
@dataclass(kw_only=True)
class IVLP(PromptMethod):
    """Learned vectors in both towers, independent of each other."""

    n_ctx: int = hyper(2, "vectors in a text (MaPLe's baseline; 4 in PromptSRC's)", low=1)
    n_visual: int = hyper(2, "tokens in a picture (MaPLe's baseline; 4 in PromptSRC's)", low=1)
    depth: int = hyper(12, "blocks with vectors of their own, in each tower at most all (PromptSRC's: 9)", low=1)
    init: str | None = hyper("a photo of a", "words the first n_ctx tokens of which start the vectors; None: random")
    lr: float = hyper(3.5e-3, "SGD learning rate, momentum 0.9, weight decay 5e-4 (MaPLe's baseline)", low=0)
    epochs: int | None = hyper(5, "passes over the support set (MaPLe's baseline)", low=1)
    batch_size: int = hyper(4, "pictures a step (MaPLe's baseline)", low=1)
    min_scale: float = hyper(0.08, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)

    card = Card(
        key="ivlp",
        title="MaPLe: Multi-modal Prompt Learning",
        arxiv="2210.03117",
        family="prompt-learning",
        task="few-shot classification",
        trains="context vectors and tokens in the image tower",
        signal="labels",
        requires=frozenset({"texts", "prompts", "gradients"}),
        new_classes=True,
    )
    reads_pixels = True
    tiny = {"n_ctx": 4, "n_visual": 8, "epochs": 20, "batch_size": 8, "min_scale": 1.0}

    def _learner(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        return IndependentPrompts(backbone, class_names, *self._initial(backbone))

    def _initial(self, backbone: Backbone) -> tuple[list[Tensor], list[Tensor], str]:
        """Start values of the texts' vectors and the pictures' tokens, and the words that stay."""
        context, words = split_words(backbone, self.init, self.n_ctx)
        textual = deep_vectors(backbone, "text", self.n_ctx, self.depth, context)
        return textual, deep_vectors(backbone, "vision", self.n_visual, self.depth), words
