"""MoCoOp: a prompt for each group of hand-written templates, and a router that picks the two that suit an image.

    logits_c = s sum_g r_g <x, t_gc>     t_gc = unit(text(V_g, NAME_c))     r = softmax of router(x)'s k largest, else 0
    loss = CE(logits, y) + 5 CE(<t_gc, P_g1 .. P_gC>, c) + CE(router(x), softmax(q + 10 on its k largest))

Prompt V_g starts from the words of the first template of group g, those before the name and those behind it. P_gc is
the mean text feature of the group's templates: it holds the prompt to what its group says of every class (second
term, a mean over g and c), and teaches the router which groups describe an image's true class best (third term, with
q_g = <x, P_gy>).

Du, Niu and Zhao, "Mixture of Prompt Learning for Vision Language Models" (arXiv 2409.12011). Of the paper only the
abstract was read; the rest is from the official repository dyabel/mocoop: the terms and their weights, k = 2, no
temperature in the second term (`text_scale`), a learned shift of all text features (`correction`, on in its settings,
off here because the abstract has none), SGD at 0.032 with batches of 32, gradients cut to norm 1, 50 epochs.
Departures:

* the image tower stays frozen; the official settings also train its layer norms, which the abstract does not say;
* the second term runs over the training classes, not over the names of classes still to come;
* prototypes are in the order of the labels (the official code mixes them up where classes are split in two), and the
  vectors are the template's tokens, its final period included (the official code counts words and drops the period), so
  that training starts from the templates' own features;
* warm-up lasts one epoch, not five, and there are no random crops (`views`);
* the official groups are written for each data set; `GROUPS` is ours and general.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone
from clipadapt.data.templates.sets import class_texts
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes
from clipadapt.methods import Classifier, PromptLearner, PromptMethod, hyper, method
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.nn.prompts import MEMORY, ClassPrompts, word_ids
from clipadapt.training.loop import Loss

# The 80 templates that come with CLIP, by what they call the image: each belongs to the first group one of whose
# words it has, and the group's prompt starts from the template on the left.
GROUPS = {
    "a low resolution photo of a {}.": "low pixelated jpeg blurry bad dark dirty hard",
    "a drawing of a {}.": "drawing sketch doodle cartoon painting art graffiti tattoo",
    "a rendering of a {}.": "rendering rendition game",
    "a sculpture of a {}.": "sculpture origami toy plushie plastic embroidered",
    "a photo of a {}.": "photo itap",
}


def general_groups() -> list[list[str]]:
    """The set "openai-80" in the groups of `GROUPS`, each with its first template in front."""
    left = class_texts(["{}"], "openai-80")[0]
    groups = []
    for first, words in GROUPS.items():
        group = [t for t in left if set(words.split()) & set(t.rstrip(".").split())]
        left = [t for t in left if t not in group]
        groups.append([first, *(t for t in group if t != first)])
    return groups


def routing(gate: Tensor, top_k: int) -> Tensor:
    """What the router says (B, G) -> weights (B, G): softmax over the `top_k` largest, 0 for the others."""
    kept, which = gate.topk(min(top_k, gate.shape[1]), dim=1)
    return torch.zeros_like(gate).scatter(1, which, kept.softmax(1))


def guidance(images: Tensor, prototypes: Tensor, top_k: int) -> Tensor:
    """What the router should say (B, G), of images (B, D) and their true classes' prototypes (G, B, D)."""
    similar = torch.einsum("bd,gbd->bg", images, prototypes)
    best = similar.topk(min(top_k, similar.shape[1]), dim=1).indices
    return (similar + torch.zeros_like(similar).scatter(1, best, 10.0)).softmax(1)


def grouped_text_loss(texts: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """Whether every prompt's class (G, C, D) is recognised among its group's prototypes (G, C, D)."""
    logits = scale * texts @ prototypes.mT  # (G, C, C)
    classes = torch.arange(texts.shape[1], device=texts.device).repeat(len(texts))
    return cross_entropy(logits.flatten(0, 1), classes)


class MixtureLearner(PromptLearner):
    """A prompt for each of G groups of templates, and the router."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        self.groups = general_groups() if of.groups is None else [class_texts(["{}"], group)[0] for group in of.groups]
        self.contexts = nn.ParameterList()
        members: dict[tuple[int, int], list[int]] = {}  # vectors before and behind the name -> groups
        for number, templates in enumerate(self.groups):
            before, after = (word_ids(backbone, words) for words in templates[0].split("{}", 1))
            if not before + after:
                raise ClipadaptError(f"the template {templates[0]!r} has no words for a prompt to start from.")
            vectors = backbone.embed_tokens(torch.tensor(before + after))
            self.contexts.append(nn.Parameter(vectors.detach().clone()))  # (n, W)
            members.setdefault((len(before), len(after)), []).append(number)
        self.members = list(members.values())  # prompts of one shape are encoded together
        self.prompts = [
            ClassPrompts(backbone, class_names, b + a, position=b, ending="", memory=MEMORY // len(members))
            for b, a in members
        ]
        self.router = nn.Linear(backbone.dim, len(self.groups))
        self.correction = nn.Parameter(torch.zeros(backbone.dim)) if of.correction else None

    @cached_property
    def prototypes(self) -> Tensor:
        """Of every group, its templates' mean text feature of each class (G, C, D)."""
        features = [encode_classes(self.backbone, self.class_names, templates) for templates in self.groups]
        return torch.stack(features).to(self.backbone.device)

    def texts(self) -> Tensor:
        """Unit features of the classes in every prompt (G, C, D)."""
        features: dict[int, Tensor] = {}
        for prompts, members in zip(self.prompts, self.members, strict=True):
            contexts = torch.stack([self.contexts[g] for g in members])[:, None]  # (G', 1, n, W)
            features |= zip(members, prompts.encode(contexts, normalize=False), strict=True)
        stacked = torch.stack([features[g] for g in range(len(self.groups))])
        return normalize(stacked if self.correction is None else stacked + self.correction, dim=-1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Image features (B, D) and class features (G, C, D) -> (B, C)."""
        weights = routing(self.router(images), self.of.top_k)  # (B, G)
        return self.logit_scale * sum(w[:, None] * (images @ t.T) for w, t in zip(weights.T, texts, strict=True))

    def loss(self, batch: Batch) -> Loss:
        images, texts = self.seen(batch), self.texts()
        logits = self.logits(images, texts)
        target = guidance(images, self.prototypes[:, batch.labels], self.of.top_k)
        loss = cross_entropy(logits, batch.labels)
        loss = loss + self.of.text_weight * grouped_text_loss(texts, self.prototypes, self.of.text_scale)
        loss = loss + self.of.gate_weight * cross_entropy(self.router(images), target)
        return loss, logits.argmax(1) == batch.labels


@method(
    "mocoop",
    title="Mixture of Prompt Learning for Vision Language Models",
    arxiv="2409.12011",
    problem="few-shot classification, base-to-new, domain generalisation",
    trains="context vectors and a router",
    new_classes=True,
)
class MoCoOp(PromptMethod, Classifier):
    """A mixture of learned prompts that are chosen for each image.

    >>> sentences = [["a photo of a {}."], ["a photo of the large {}."], ["a photo of the small {}."]]
    >>> model = create("mocoop", epochs=1, groups=sentences).fit(backbone, support)
    >>> model.with_classes(["red", "dog"]).predict_proba(queries).shape
    (8, 2)
    """

    groups: Any = hyper(
        None, "groups of templates, each a list or a set's name, one prompt for each; None: five groups of openai-80"
    )
    top_k: int = hyper(2, "prompts that an image is judged by (official)", low=1)
    text_weight: float = hyper(5.0, "weight of the grouped text loss (official)", low=0)
    gate_weight: float = hyper(1.0, "weight of the router's guidance (official)", low=0)
    text_scale: float = hyper(1.0, "scale of the cosines in the grouped text loss (official: none, 1)", low=0)
    correction: bool = hyper(False, "learn a shift of all text features (on in the official settings)")
    lr: float = hyper(0.032, "SGD learning rate, momentum 0.9, weight decay 5e-4, gradients of norm 1 at most", low=0)
    epochs: int | None = hyper(50, "passes over the support set (official); None: 50, 100 or 200 by shots", low=1)

    learner = MixtureLearner
    clip_norm = 1.0
