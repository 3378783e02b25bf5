"""CoCoOp: the context depends on the image, by a small network that shifts all of its vectors alike.

    t_c(x) = text(start, v_1 + h(x) .. v_M + h(x), NAME_c, ".", end)     h(x) = B relu(A x + a) + b,  x unit
    logits_c = s <x, unit(t_c(x))>                                       learned: V, A, a, B, b

Zhou et al., "Conditional Prompt Learning for Vision-Language Models" (arXiv 2203.05557). Its abstract was read; all
details are those of the official repository KaiyangZhou/CoOp: 4 vectors started from "a photo of a", hidden size D / 16
(at least 1 here), SGD 2e-3 as in CoOp, 10 epochs, one image a step.

Every image has prompts of its own, so a step or a prediction costs one pass of the text tower for each image. Images
go through it together here, and `batch_size` changes the result only as the number of images in a step of SGD; the
default stays at the published 1. Departure: image features are encoded once, without random crops (`views` gives a
fixed number of them).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clipadapt.backbones import Backbone
from clipadapt.methods import Classifier, PromptMethod, hyper, method
from clipadapt.methods.kinds.contexts import ShiftedLearner


class ConditionalLearner(ShiftedLearner):
    """A context (M, W) for all classes, and a network from an image's unit feature (D,) to its shift (W,)."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        hidden = max(1, backbone.dim // 16)
        self.meta_net = nn.Sequential(
            nn.Linear(backbone.dim, hidden), nn.ReLU(), nn.Linear(hidden, backbone.width("text"))
        )

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, D) -> (B, C)"""
        return self.logit_scale * self.cosines(images, self.meta_net(images))


@method(
    "cocoop",
    title="Conditional Prompt Learning for Vision-Language Models",
    arxiv="2203.05557",
    trains="context vectors and a network that shifts them",
    new_classes=True,
)
class CoCoOp(PromptMethod, Classifier):
    """Learned context vectors that each image shifts.

    >>> model = create("cocoop", epochs=1, n_ctx=4).fit(backbone, support)
    >>> model.with_classes(["red", "dog"]).predict_proba(queries).shape
    (8, 2)
    """

    epochs: int | None = hyper(10, "passes over the support set (official code)", low=1)
    batch_size: int = hyper(1, "images a step (official code)", low=1)
    n_ctx: int = hyper(4, "context vectors M, where init is None", low=1)
    init: str | None = hyper("a photo of a", "words to start from, which set n_ctx (official); None: random")

    learner = ConditionalLearner
