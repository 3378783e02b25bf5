"""VPT: learned tokens next to the patches, at the input or before every block; class texts and both towers are frozen.

    [x_0, E_0, P_0] -> block 1 -> [x_1, E_1, _], then P_1 in place of what became of P_0, and so on: "deep".
    "Shallow" (depth = 1) has P_0 only.        min over P of  CE(s x(P) T', y)

Jia et al., "Visual Prompt Tuning" (arXiv 2203.12119), of which the abstract and public summaries were read; here as
the vision-only baseline of MaPLe (arXiv 2210.03117), after that paper's official repository,
muzairkhattak/multimodal-prompt-learning: T from "a photo of a NAME." in place of a learned linear head, tokens from
N(0, 0.02), put behind the patches (where among them makes no difference, since tokens have no position) and through
the norm before the first block; 8 tokens, depth 12, SGD 2.5e-3, 5 epochs, batch 4, random crops (0.08-1) with flips.
The depth is min(depth, blocks of the image tower).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clipadapt.backbones import Backbone, Insertion
from clipadapt.features import encode_classes
from clipadapt.methods import Classifier, PromptLearner, PromptMethod, hyper, method
from clipadapt.nn.prompts import deep_vectors, visual_prompts


class VisualPrompts(PromptLearner):
    """Tokens (n, W) for each of the first blocks of the image tower, and fixed class features (C, D)."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        self.visual = nn.ParameterList(deep_vectors(backbone, "vision", of.n_ctx, of.depth))
        self.classes = encode_classes(backbone, class_names, of.templates).to(backbone.device)

    def texts(self) -> Tensor:
        return self.classes

    def vision(self) -> list[Insertion]:
        first, *deeper = self.visual
        return visual_prompts(first, deeper)


@method(
    "vpt",
    title="Visual Prompt Tuning",
    arxiv="2203.12119",
    trains="tokens in the image tower",
    requires={"texts", "prompts", "gradients"},
    new_classes=True,
)
class VPT(PromptMethod, Classifier):
    """Learned tokens in the image tower; the classifier is the zero-shot one of `templates`.

    >>> model = create("vpt", epochs=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    n_ctx: int = hyper(8, "tokens before each block (MaPLe's baseline)", low=1)
    depth: int = hyper(12, "blocks that get tokens of their own, at most all; 1 is VPT-shallow", low=1)
    lr: float = hyper(2.5e-3, "SGD learning rate, momentum 0.9, weight decay 5e-4 (MaPLe's baseline)", low=0)
    epochs: int | None = hyper(5, "passes over the support set (MaPLe's baseline)", low=1)
    batch_size: int = hyper(4, "images a step (MaPLe's baseline)", low=1)
    min_scale: float = hyper(0.08, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)

    learner = VisualPrompts
