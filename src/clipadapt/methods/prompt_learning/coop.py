"""CoOp: the words around a class name become learned vectors; both towers stay frozen.

    t_c(V) = text(start, v_1 .. v_M, NAME_c, ".", end)        min over V of  CE(s x unit(t(V))', y)

Zhou et al., "Learning to Prompt for Vision-Language Models" (arXiv 2109.01134), section 3.2; layout, initial values
and optimiser from the official repository KaiyangZhou/CoOp (M = 16 from N(0, 0.02), SGD 2e-3 with momentum 0.9 and
weight decay 5e-4, cosine by epoch after one epoch at 1e-5, batch 32; 50 epochs for 1 shot, 100 for 2 and 4, 200 for
more). Departure: image features are encoded once, without random crops (`views` gives a fixed number of them).

Where images show several classes, the pairwise ranking loss of TaI-DPT (arXiv 2211.12739) takes the place of
cross-entropy; this is ours, as the paper has one class an image.
"""

from typing import Any

from torch import Tensor

from clipadapt.errors import ClipadaptError
from clipadapt.losses.ranking import FACTOR, pairwise_ranking
from clipadapt.methods import Classifier, PromptMethod, hyper, method
from clipadapt.methods.kinds.contexts import ContextLearner
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.nn.prompts import random_vectors
from clipadapt.training.loop import Loss


class CoOpLearner(ContextLearner):
    """One context for all classes (M, W), or one for each (C, M, W)."""

    def first(self) -> Tensor:
        classes = (len(self.class_names),) * self.of.class_specific
        if self.of.init:
            return super().first().expand(*classes, -1, -1).clone()
        return random_vectors(*classes, self.of.n_ctx, self.backbone.width("text"))

    def loss(self, batch: Batch) -> Loss:
        if batch.labels.ndim == 1:
            return super().loss(batch)
        return pairwise_ranking(FACTOR * self.seen(batch) @ self.texts().T, batch.labels)


@method(
    "coop",
    title="Learning to Prompt for Vision-Language Models",
    arxiv="2109.01134",
    trains="context vectors",
    new_classes=True,
    multi_label=True,
)
class CoOp(PromptMethod, Classifier):
    """Learned context vectors in front of (or around) the class names.

    >>> model = create("coop", epochs=2, init="a photo of a").fit(backbone, support)
    >>> model.with_classes(["red", "dog"]).predict_proba(queries).shape
    (8, 2)
    """

    n_ctx: int = hyper(16, "context vectors M >= 1 (paper: 16; 4 in later work)", low=1)
    position: str = hyper("end", "where the class name stands", choices=("end", "middle", "front"))
    class_specific: bool = hyper(False, "a context of its own for each class (the paper's CSC)")
    init: str | None = hyper(None, 'words to start from, such as "a photo of a"; they set n_ctx')

    learner = CoOpLearner

    def _reclassify(self, model: Any) -> None:
        if self.class_specific:
            raise ClipadaptError("coop with class_specific=True has no context for classes that it has not learned.")
        super()._reclassify(model)
