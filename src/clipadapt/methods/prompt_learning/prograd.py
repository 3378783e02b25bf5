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

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, PromptMethod, hyper, method
from clipadapt.methods.kinds.contexts import TaughtLearner
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.training.loop import Loss


def aligned(gradient: Tensor, general: Tensor, strength: float) -> Tensor:
    """`gradient` less `strength` times its part against `general`, which has the same shape, any one."""
    direction = normalize(general.flatten(), dim=0).view_as(general)
    against = (gradient * direction).sum().clamp(max=0)
    return gradient - strength * against * direction


class AlignedLearner(TaughtLearner):
    """A context whose gradient is projected."""

    def first(self) -> Tensor:
        """The words' vectors last, behind zeros, (n_ctx, W)."""
        words = super().first()
        if len(words) > self.of.n_ctx:
            raise ClipadaptError(f"{self.of.init!r} has {len(words)} tokens, more than n_ctx = {self.of.n_ctx}.")
        return torch.cat([words.new_zeros(self.of.n_ctx - len(words), words.shape[1]), words])

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy with the labels, that with the zero-shot classifier, and the logits (B, C)."""
        images, temperature = self.seen(batch), self.of.temperature
        logits = self.logits(images, self.texts())
        zero_shot = (self.logits(images, self.teacher) / temperature).softmax(1)
        general = cross_entropy(logits / temperature, zero_shot) * temperature**2
        return cross_entropy(logits, batch.labels), general, logits

    def loss(self, batch: Batch) -> Loss:
        domain, general, logits = self.losses(batch)
        learned = list(self.parameters())
        general_direction = torch.autograd.grad(general, learned, retain_graph=True)
        gradients = torch.autograd.grad(domain, learned)
        loss = domain.detach()
        for p, g, u in zip(learned, gradients, general_direction, strict=True):
            # worth nothing, but its gradient is the projected one
            loss = loss + ((p - p.detach()) * aligned(g, u, self.of.strength)).sum()
        return loss, logits.argmax(1) == batch.labels


@method(
    "prograd",
    title="Prompt-aligned Gradient for Prompt Tuning",
    arxiv="2205.14865",
    trains="context vectors",
    new_classes=True,
)
class ProGrad(PromptMethod, Classifier):
    """Learned context vectors whose steps do not oppose the zero-shot classifier of `templates`.

    >>> model = create("prograd", epochs=1, n_ctx=4).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    n_ctx: int = hyper(16, "context vectors M (official code)", low=1)
    init: str | None = hyper("a photo of a", "words that the last vectors start from, the others at 0; None: random")
    strength: float = hyper(1.0, "lambda: how much of the opposing part is taken out (official: 1 or 0.8)", low=0)
    temperature: float = hyper(1.0, "T of both softmax in the general direction (official code)", low=1e-3)

    learner = AlignedLearner
