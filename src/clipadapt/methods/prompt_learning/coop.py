"""CoOp: the words around a class name become learned vectors; both towers stay frozen.

    t_c(V) = text(start, v_1 .. v_M, NAME_c, ".", end)        min over V of  CE(s x unit(t(V))', y)

Zhou et al., "Learning to Prompt for Vision-Language Models" (arXiv 2109.01134), section 3.2; layout, initial values
and optimiser from the official repository KaiyangZhou/CoOp (M = 16 from N(0, 0.02), SGD 2e-3 with momentum 0.9 and
weight decay 5e-4, cosine by epoch after one epoch at 1e-5, batch 32; 50 epochs for 1 shot, 100 for 2 and 4, 200 for
more). Departure: image features are encoded once, without random crops (`views` gives a fixed number of them).

Where pictures show several classes, the pairwise ranking loss of TaI-DPT (arXiv 2211.12739) takes the place of
cross-entropy; this is ours, as the paper has one class a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from clipadapt.backbones import Backbone
from clipadapt.errors import ClipadaptError
from clipadapt.losses.ranking import FACTOR, pairwise_ranking
from clipadapt.methods.base import Card, hyper
from clipadapt.methods.prompt_method import Batch, PromptLearner, PromptMethod
from clipadapt.methods.registry import register
from clipadapt.nn.prompts import ClassPrompts, random_vectors, word_vectors
from clipadapt.training.loop import Loss


class ContextLearner(PromptLearner):
    """One context for all classes (M, W), or one for each (C, M, W)."""

    def __init__(self, backbone: Backbone, class_names: Sequence[str], context: Tensor, position: str = "end") -> None:
        super().__init__(backbone, class_names)
        self.context = nn.Parameter(context)
        self.prompts = ClassPrompts(backbone, class_names, context.shape[-2], position=position)

    def texts(self) -> Tensor:
        return self.prompts.encode(self.context)  # (C, D)

    def loss(self, batch: Batch) -> Loss:
        if batch.labels.ndim == 1:
            return super().loss(batch)
        return pairwise_ranking(FACTOR * self.seen(batch) @ self.texts().T, batch.labels)


@register
@dataclass(kw_only=True)
class CoOp(PromptMethod):
    """Learned context vectors in front of (or around) the class names."""

    n_ctx: int = hyper(16, "context vectors M >= 1 (paper: 16; 4 in later work)", low=1)
    position: str = hyper("end", "where the class name stands", choices=("end", "middle", "front"))
    class_specific: bool = hyper(False, "a context of its own for each class (the paper's CSC)")
    init: str | None = hyper(None, 'words to start from, such as "a photo of a"; they set n_ctx')

    card = Card(
        key="coop",
        title="Learning to Prompt for Vision-Language Models",
        arxiv="2109.01134",
        family="prompt-learning",
        task="few-shot classification",
        trains="context vectors",
        signal="labels",
        requires=frozenset({"texts", "prompts"}),
        new_classes=True,
        multi_label=True,
    )
    tiny = {"init": "a photo of a", "class_specific": True, "epochs": 20, "lr": 0.3}

    def _learner(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        classes = (len(class_names),) * self.class_specific
        if self.init is not None:
            words = word_vectors(backbone, self.init)  # (M, W)
            context = words.expand(*classes, -1, -1).clone()
        else:
            context = random_vectors(*classes, self.n_ctx, backbone.width("text"))
        return ContextLearner(backbone, class_names, context, self.position)

    def _reclassify(self, backbone: Backbone) -> None:
        if self.class_specific:
            raise ClipadaptError("coop with class_specific=True has no context for classes that it has not learned.")
        super()._reclassify(backbone)
