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

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipadapt.backbones import Backbone
from clipadapt.errors import ClipadaptError
from clipadapt.methods.base import Card, hyper
from clipadapt.methods.prompt_method import PromptLearner, PromptMethod
from clipadapt.methods.registry import register
from clipadapt.nn.prompts import MEMORY, ClassPrompts, random_vectors, word_vectors


class EnsembleLearner(PromptLearner):
    """K contexts (M_k, W), each for all classes; those of one length are encoded together."""

    def __init__(self, backbone: Backbone, class_names: Sequence[str], contexts: Sequence[Tensor]) -> None:
        super().__init__(backbone, class_names)
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


@register
@dataclass(kw_only=True)
class ECO(PromptMethod):
    """An ensemble of learned contexts, averaged in feature space."""

    n_prompts: int = hyper(4, "contexts K; 1 is CoOp", low=1)
    n_ctx: int = hyper(16, "context vectors of all contexts together, shared out evenly", low=1)
    init: Any = hyper(None, "list of different words to start the contexts from; they set n_prompts and n_ctx")

    card = Card(
        key="eco",
        title="ECO: Ensembling Context Optimization for Vision-Language Models",
        arxiv="2307.14063",
        family="prompt-learning",
        task="few-shot classification",
        trains="context vectors",
        signal="labels",
        requires=frozenset({"texts", "prompts"}),
        new_classes=True,
    )
    tiny = {"epochs": 60, "lr": 0.1}

    def _learner(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        if self.init is not None:
            if isinstance(self.init, str) or not self.init or len(set(self.init)) < len(self.init):
                raise ClipadaptError(f"init = {self.init!r} must be a list of different words, one for each context.")
            contexts = [word_vectors(backbone, words) for words in self.init]
        else:
            if self.n_ctx < self.n_prompts:
                raise ClipadaptError(f"{self.n_ctx} context vectors do not suffice for {self.n_prompts} contexts.")
            each, more = divmod(self.n_ctx, self.n_prompts)
            width = backbone.width("text")
            contexts = [random_vectors(each + (k < more), width) for k in range(self.n_prompts)]
        return EnsembleLearner(backbone, class_names, contexts)
