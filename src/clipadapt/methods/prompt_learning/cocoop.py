"""CoCoOp: the context depends on the picture, by a small network that shifts all of its vectors alike.

    t_c(x) = text(start, v_1 + h(x) .. v_M + h(x), NAME_c, ".", end)     h(x) = B relu(A x + a) + b,  x unit
    logits_c = s <x, unit(t_c(x))>                                       learned: V, A, a, B, b

Zhou et al., "Conditional Prompt Learning for Vision-Language Models" (arXiv 2203.05557). Its abstract was read; all
details are those of the official repository KaiyangZhou/CoOp: 4 vectors started from "a photo of a", hidden size D / 16
(at least 1 here), SGD 2e-3 as in CoOp, 10 epochs, one picture a step.

Every picture has prompts of its own, so a step or a prediction costs one pass of the text tower for each picture.
Pictures go through it together here, and `batch_size` changes the result only as the number of pictures in a step of
SGD; the default stays at the published 1. Departure: image features are encoded once, without random crops (`views`
gives a fixed number of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipadapt.backbones import Backbone
from clipadapt.methods.base import Card, hyper
from clipadapt.methods.prompt_learning.coop import ContextLearner
from clipadapt.methods.prompt_method import PromptLearner, PromptMethod
from clipadapt.methods.registry import register
from clipadapt.nn.prompts import first_context

PROMPTS = 4096  # pictures x classes that are encoded together when predicting; training takes the whole batch


class ConditionalLearner(ContextLearner):
    """A context (M, W) for all classes, and a network from a picture's unit feature (D,) to its shift (W,)."""

    def __init__(self, backbone: Backbone, class_names: Sequence[str], context: Tensor) -> None:
        super().__init__(backbone, class_names, context)
        hidden = max(1, backbone.dim // 16)
        self.meta_net = nn.Sequential(
            nn.Linear(backbone.dim, hidden), nn.ReLU(), nn.Linear(hidden, backbone.width("text"))
        )

    def texts(self) -> Tensor:
        """Nothing (C, 0): what the classes are depends on the picture."""
        return self.context.new_empty(len(self.class_names), 0)

    def texts_for(self, images: Tensor) -> Tensor:
        """Unit image features (B, D) -> unit features of the classes for each picture (B, C, D)."""
        shift = self.meta_net(images)  # (B, W)
        return self.prompts.encode(self.context + shift[:, None, None])  # from (B, 1, M, W)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, D) -> (B, C); `texts` says only how many classes there are."""
        if len(images) == 0:
            return images.new_empty(0, len(texts))
        together = len(images) if torch.is_grad_enabled() else max(1, PROMPTS // len(texts))
        parts = [torch.einsum("bd,bcd->bc", part, self.texts_for(part)) for part in images.split(together)]
        return self.logit_scale * torch.cat(parts)


@register
@dataclass(kw_only=True)
class CoCoOp(PromptMethod):
    """Learned context vectors that each picture shifts."""

    epochs: int | None = hyper(10, "passes over the support set (official code)", low=1)
    batch_size: int = hyper(1, "pictures a step (official code)", low=1)
    n_ctx: int = hyper(4, "context vectors M, where init is None", low=1)
    init: str | None = hyper("a photo of a", "words to start from, which set n_ctx (official); None: random")

    card = Card(
        key="cocoop",
        title="Conditional Prompt Learning for Vision-Language Models",
        arxiv="2203.05557",
        family="prompt-learning",
        task="few-shot classification",
        trains="context vectors and a network that shifts them",
        signal="labels",
        requires=frozenset({"texts", "prompts"}),
        new_classes=True,
    )
    tiny = {"epochs": 40, "batch_size": 4, "lr": 0.003}

    def _learner(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        return ConditionalLearner(backbone, class_names, first_context(backbone, self.n_ctx, self.init))
