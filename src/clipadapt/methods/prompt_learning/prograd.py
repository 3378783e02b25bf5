"""ProGrad: CoOp never steps against what zero-shot CLIP knows; the part of a gradient that would is taken out.

    g = d CE(logits, y) / dV      u = unit(d CE(logits / T, softmax(zero-shot / T)) / dV)
    step along  g - lambda min(0, <g, u>) u                         for each learned tensor V by itself

Zhu et al., "Prompt-aligned Gradient for Prompt Tuning" (arXiv 2205.14865). Its abstract was read, which has the general
direction as the gradient of a Kullback-Leibler term; all details are those of the official repository
BeierZhu/Prompt-align: the cross-entropy with the teacher (the same gradient: the teacher's entropy is constant, here as
there the term is times T^2), lambda 1 and T 1 (lambda 0.8 for Flowers102, DTD and EuroSAT at 8 and 16 shots), context
of 16 vectors of which the last are "a photo of a" and the others zero, optimiser and epochs of CoOp. Its words come
first, "a type of pet, a photo of a {}." (templates "prograd/pets"), and start the context too: give both `templates`
and `init`. Departures: image features are encoded once, without random crops (`views` gives a fixed number of them);
the reported loss is the cross-entropy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes
from clipadapt.methods.base import Card, hyper
from clipadapt.methods.prompt_learning.coop import ContextLearner
from clipadapt.methods.prompt_method import Batch, PromptLearner, PromptMethod
from clipadapt.methods.registry import register
from clipadapt.nn.prompts import first_context
from clipadapt.training.loop import Loss


def aligned(gradient: Tensor, general: Tensor, strength: float) -> Tensor:
    """`gradient` less `strength` times its part against `general`; of the same shape, whatever it is."""
    direction = normalize(general.flatten(), dim=0).view_as(general)
    against = (gradient * direction).sum().clamp(max=0)
    return gradient - strength * against * direction


class TaughtLearner(ContextLearner):
    """A context (M, W) for all classes, and the zero-shot classifier of hand-written `templates` to learn from."""

    def __init__(self, backbone: Backbone, class_names: Sequence[str], context: Tensor, templates: Any) -> None:
        super().__init__(backbone, class_names, context)
        self.templates = templates

    @cached_property  # only training needs it
    def teacher(self) -> Tensor:
        """Unit features (C, D) of the classes' sentences."""
        return encode_classes(self.backbone, self.class_names, self.templates).to(self.backbone.device)


class AlignedLearner(TaughtLearner):
    """A context whose gradient is projected."""

    strength, temperature = 1.0, 1.0

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy with the labels, that with the zero-shot classifier, and the logits (B, C)."""
        images = self.seen(batch)
        logits = self.logits(images, self.texts())
        zero_shot = (self.logits(images, self.teacher) / self.temperature).softmax(1)
        general = cross_entropy(logits / self.temperature, zero_shot) * self.temperature**2
        return cross_entropy(logits, batch.labels), general, logits

    def loss(self, batch: Batch) -> Loss:
        domain, general, logits = self.losses(batch)
        learned = list(self.parameters())
        general_direction = torch.autograd.grad(general, learned, retain_graph=True)
        gradients = torch.autograd.grad(domain, learned)
        loss = domain.detach()
        for p, g, u in zip(learned, gradients, general_direction, strict=True):
            # worth nothing, but its gradient is the projected one
            loss = loss + ((p - p.detach()) * aligned(g, u, self.strength)).sum()
        return loss, logits.argmax(1) == batch.labels


@register
@dataclass(kw_only=True)
class ProGrad(PromptMethod):
    """Learned context vectors whose steps do not oppose the zero-shot classifier of `templates`."""

    n_ctx: int = hyper(16, "context vectors M (official code)", low=1)
    init: str | None = hyper("a photo of a", "words that the last vectors start from, the others at 0; None: random")
    strength: float = hyper(1.0, "lambda: how much of the opposing part is taken out (official: 1 or 0.8)", low=0)
    temperature: float = hyper(1.0, "T of both softmax in the general direction (official code)", low=1e-3)

    card = Card(
        key="prograd",
        title="Prompt-aligned Gradient for Prompt Tuning",
        arxiv="2205.14865",
        family="prompt-learning",
        task="few-shot classification",
        trains="context vectors",
        signal="labels",
        requires=frozenset({"texts", "prompts"}),
        new_classes=True,
    )
    tiny = {"n_ctx": 7, "epochs": 150, "batch_size": 80, "lr": 0.02}

    def _learner(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        context = first_context(backbone, self.n_ctx, self.init)
        if len(context) > self.n_ctx:
            raise ClipadaptError(f"{self.init!r} has {len(context)} tokens, more than n_ctx = {self.n_ctx}.")
        zeros = context.new_zeros(self.n_ctx - len(context), context.shape[1])
        learner = AlignedLearner(backbone, class_names, torch.cat([zeros, context]), self.templates)
        learner.strength, learner.temperature = self.strength, self.temperature
        return learner
