"""ECO: several short contexts instead of one long one, learned together; a class is the mean of its prompts.

    w_c = unit(1/K sum_k unit(text(start, V_k, NAME_c, ".", end)))        min over V_1 .. V_K of  CE(s x w', y)

The K contexts share CoOp's number of vectors between them, and after training only w is left, as large as any zero-shot
classifier. Every w_c depends on all contexts in the same way, so contexts that start equal would stay equal: each
starts from its own random vectors, or from its own words.

Agnolucci et al., "ECO: Ensembling Context Optimization for Vision-Language Models" (arXiv 2307.14063). Only the
abstract and the start of the introduction were read, and no official code is known: unit length before the mean (as
in CLIP's ensembles of templates), one cross-entropy of the mean, K = 4, the 16 vectors shared out, and CoOp's layout,
start values and training are our reading. The mean leaves each context about 1 / K of the gradient that CoOp's would
get at the same learning rate. Departure, as in CoOp: no random crops (`views`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipadapt.backbones import Backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, PromptLearner, PromptMethod, hyper, method
from clipadapt.nn.prompts import MEMORY, ClassPrompts, random_vectors, word_vectors


def first_contexts(backbone: Backbone, n_prompts: int, n_ctx: int, init: Any) -> list[Tensor]:
    """Start values of the K contexts, each (M_k, W): the words of `init`, or a share of `n_ctx` random vectors."""
    if init is not None:
        if isinstance(init, str) or not init or len(set(init)) < len(init):
            raise ClipadaptError(f"init = {init!r} must be a list of different words, one for each context.")
        return [word_vectors(backbone, words) for words in init]
    if n_ctx < n_prompts:
        raise ClipadaptError(f"{n_ctx} context vectors do not suffice for {n_prompts} contexts.")
    each, more = divmod(n_ctx, n_prompts)
    return [random_vectors(each + (k < more), backbone.width("text")) for k in range(n_prompts)]


class EnsembleLearner(PromptLearner):
    """K contexts (M_k, W), each for all classes; those of one length are encoded together."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        contexts = first_contexts(backbone, of.n_prompts, of.n_ctx, of.init)
        lengths = sorted({len(context) for context in contexts})
        stacks = [torch.stack([context for context in contexts if len(context) == length]) for length in lengths]
        self.contexts = nn.ParameterList(nn.Parameter(stack) for stack in stacks)  # each (K', M, W)
        share = MEMORY // len(lengths)
        self.prompts = [ClassPrompts(backbone, class_names, length, memory=share) for length in lengths]

    def members(self) -> Tensor:
        """Unit features of every class in every context (K, C, D)."""
        return torch.cat([p.encode(c[:, None]) for p, c in zip(self.prompts, self.contexts, strict=True)])

    def texts(self) -> Tensor:
        return normalize(self.members().mean(0), dim=-1)  # (C, D)


@method(
    "eco",
    title="ECO: Ensembling Context Optimization for Vision-Language Models",
    arxiv="2307.14063",
    trains="context vectors",
    new_classes=True,
)
class ECO(PromptMethod, Classifier):
    """An ensemble of learned contexts, averaged in feature space.

    >>> model = create("eco", epochs=2).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    n_prompts: int = hyper(4, "contexts K; 1 is CoOp", low=1)
    n_ctx: int = hyper(16, "context vectors of all contexts together, shared out evenly", low=1)
    init: Any = hyper(None, "list of different words to start the contexts from; they set n_prompts and n_ctx")

    learner = EnsembleLearner
