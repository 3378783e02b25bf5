"""MaPLe: learned vectors in the text tower, and in the image tower what linear maps make of them.

    p_j = W_j v_j + b_j,  j = 0 (at the input), 1 .. J-1 (before that block)    min over v, W, b of  CE(s x(p) t(v)', y)

Khattak et al., "MaPLe: Multi-modal Prompt Learning" (arXiv 2210.03117); its abstract was read, and for every detail the
official repository muzairkhattak/multimodal-prompt-learning: 2 vectors, depth J = 9, those at the input started from
"a photo" while "of a" stays, the deeper ones from N(0, 0.02), maps as PyTorch starts linear layers; SGD 3.5e-3,
5 epochs, batch 4, random crops (0.08-1) with flips. Across data sets it has depth 3, SGD 2.6e-3 and 2 epochs.

J is min(depth, blocks of the shallower tower), since each p_j needs a block in both. Departure: each map has start
values of its own, where the official code copies one to all deeper blocks.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clipadapt.backbones import Backbone, Insertion
from clipadapt.methods import Classifier, PromptMethod, hyper, method
from clipadapt.methods.kinds.tower_prompts import DeepTexts
from clipadapt.nn.prompts import visual_prompts


class CoupledPrompts(DeepTexts):
    """Vectors (n, Wt) for each of the first J blocks, and J maps of them to tokens of the image tower (n, Wv)."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        widths = backbone.width("text"), backbone.width("vision")
        self.couplings = nn.ModuleList(nn.Linear(*widths) for _ in self.textual)

    def text_depth(self) -> int:
        return min(self.of.depth, len(self.backbone.blocks("vision")))

    def visual(self) -> list[Tensor]:
        """What the maps make of the vectors: J times (n, Wv)."""
        return [coupling(vectors) for coupling, vectors in zip(self.couplings, self.textual, strict=True)]

    def vision(self) -> list[Insertion]:
        first, *deeper = self.visual()
        return visual_prompts(first, deeper)


@method(
    "maple",
    title="MaPLe: Multi-modal Prompt Learning",
    arxiv="2210.03117",
    trains="context vectors and their maps to the image tower",
    requires={"texts", "prompts", "gradients"},
    new_classes=True,
)
class MaPLe(PromptMethod, Classifier):
    """Learned vectors in the text tower, coupled to tokens in the image tower.

    >>> model = create("maple", epochs=1).fit(backbone, support)
    >>> model.with_classes(["red", "dog"]).predict_proba(queries).shape
    (8, 2)
    """

    n_ctx: int = hyper(2, "vectors in a text, and tokens in an image (official)", low=1)
    depth: int = hyper(9, "J: blocks with vectors of their own, at most those of the shallower tower (official)", low=1)
    init: str | None = hyper("a photo of a", "words the first n_ctx tokens of which start the vectors; None: random")
    lr: float = hyper(3.5e-3, "SGD learning rate, momentum 0.9, weight decay 5e-4 (official)", low=0)
    epochs: int | None = hyper(5, "passes over the support set (official)", low=1)
    batch_size: int = hyper(4, "images a step (official)", low=1)
    min_scale: float = hyper(0.08, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)

    learner = CoupledPrompts
