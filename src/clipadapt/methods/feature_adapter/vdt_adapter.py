"""VDT-Adapter (CLIP-A-self): self-attention over the sentences that describe a class, mixed back into each of them.

    h = LN(2 (r o + (1 - r) e))     o = softmax(e Wq (e Wk)' / sqrt(d)) e Wv Wo + b        e (T, D): a class's sentences
    logits = s x . unit(mean over the sentences of h)

Maniparambil et al., "Enhancing CLIP with GPT-4: Harnessing Visual Descriptions as Prompts" (arXiv 2307.11661), of which
only the abstract could be read; everything else is from the official repository mayug/VDT-Adapter: one head of width
D / 4, a residual ratio of 0.2 (tuned per data set), start values, drop-out of 0.1 on the attention and 0.5 on its
outcome, SGD at 2e-3 with momentum 0.9 and weight decay 5e-4, one picture a step, 10 epochs, CoOp's schedule.

Descriptions come in as `templates`: a mapping from class to its own sentences, or a file with one. The official ones
are whole sentences that name the class ("Siamese is a cat with fur length that is short") and are encoded as they are;
the zero-shot part of the paper, the mean of their unit features, is the method `zero-shot` with the same `templates`.
Without descriptions the sentences are those of a template set, by default the seven of "imagenet-7". Classes may have
different numbers of sentences; the official code needs the same for all.

Departures: sentence features are given one `length`, where the official code takes those of CLIP as they come (the
softmax needs it: between unit vectors all scores are alike); of a step's drop-out, all classes share what is dropped,
so that their order does not matter; features are encoded once, without augmentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear, normalize

from clipadapt.data import Dataset, class_texts
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes
from clipadapt.methods.base import Array, Card, FeatureMethod, Run, Support, hyper, unit
from clipadapt.methods.registry import register
from clipadapt.training.loop import batches, seeded, train
from clipadapt.training.schedules import cosine_by_epoch

if TYPE_CHECKING:
    from clipadapt.backbones import Backbone

ATTENTION_DROP, DROP = 0.1, 0.5


def initial(dim: int, reduction: int, seed: int) -> dict[str, Tensor]:
    """Start values for features of width `dim`, by their names in the official code."""
    width = max(dim // reduction, 1)
    with seeded(seed):
        parts = {name: nn.Linear(dim, width, bias=False) for name in ("w_qs", "w_ks", "w_vs")}
        parts["fc"] = nn.Linear(width, dim)
        for part, gain in zip(parts.values(), (1.0, 1.0, 0.67, 0.67), strict=True):
            nn.init.xavier_normal_(part.weight, gain=gain)
    return nn.ModuleDict({**parts, "layer_norm": nn.LayerNorm(dim)}).state_dict()


def class_features(
    weights: Mapping[str, Tensor],
    sentences: Tensor,
    there: Tensor,
    ratio: float,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Unit class features (C, D) of sentence features (C, T, D), of which (C, T) bool are `there`.

    `kept` are factors of drop-out, on the attention (T, T) and on its outcome (T, D).
    """
    q, k, v = (linear(sentences, weights[f"{name}.weight"]) for name in ("w_qs", "w_ks", "w_vs"))  # (C, T, d)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~there[:, None], -torch.inf)  # (C, T, T)
    attention = scores.softmax(2) * (kept[0] if kept else 1)
    out = linear(attention @ v, weights["fc.weight"], weights["fc.bias"]) * (kept[1] if kept else 1)  # (C, T, D)
    mixed = 2 * (ratio * out + (1 - ratio) * sentences)
    norm = weights["layer_norm.weight"], weights["layer_norm.bias"]
    rows = layer_norm(mixed, mixed.shape[-1:], *norm)
    return normalize((rows * there[..., None]).sum(1) / there.sum(1, keepdim=True), dim=1)


def dropped(sentences: int, dim: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The drop-out of a step: factors (T, T) and (T, D) that are 0 or make up for it."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)

    def factors(*shape: int, drop: float) -> Tensor:
        return (torch.rand(shape, generator=generator) >= drop) / (1 - drop)

    return factors(sentences, sentences, drop=ATTENTION_DROP), factors(sentences, dim, drop=DROP)


def padded(sentences: Sequence[Array], dim: int) -> tuple[Tensor, Tensor]:
    """Unit features (C, T, D) of C classes' sentences, each (T_c, D), zero where there is none; and which are there."""
    rows = [unit(own, f"the sentence features of class {c}", dim=dim) for c, own in enumerate(sentences)]
    for c, own in enumerate(rows):
        if not len(own):
            raise ClipadaptError(f"Class {c} has no sentence features; each class needs at least one.")
    there = nn.utils.rnn.pad_sequence([torch.ones(len(own), dtype=torch.bool) for own in rows], batch_first=True)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), there


@register
@dataclass(kw_only=True)
class VdtAdapter(FeatureMethod):
    """Self-attention over each class's sentences."""

    templates: Any = hyper("imagenet-7", "class descriptions (mapping or file), or templates as elsewhere")
    ratio: float = hyper(0.2, "share of the attention's outcome, in [0, 1] (official: 0.2; 0.5 once)", low=0, high=1)
    reduction: int = hyper(4, "D over the attention's width (official)", low=1)
    length: float = hyper(10.0, "of the sentence features; about that of CLIP's own", low=0)
    lr: float = hyper(2e-3, "SGD learning rate (official)", low=0)
    epochs: int = hyper(10, "passes over the support set (official)", low=1)
    batch_size: int = hyper(1, "pictures a step (official)", low=1)
    seed: int = hyper(1, "initial weights, drop-out and order of the pictures")

    card = Card(
        key="vdt-adapter",
        title="Enhancing CLIP with GPT-4: Harnessing Visual Descriptions as Prompts",
        arxiv="2307.11661",
        family="feature-adapter",
        task="few-shot classification",
        trains="attention over sentences",
        signal="labels",
        requires=frozenset({"texts"}),
        new_classes=True,
    )
    search_space = {"ratio": (0.2, 0.5, 0.8), "lr": (2e-3, 0.02)}

    def _fit_towers(
        self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run, unlabelled: Any = None
    ) -> None:
        self._sentences = self._encoded(backbone)
        super()._fit_towers(backbone, support, val, run)

    def fit_features(
        self,
        image_features: Array,
        labels: Any,
        text_features: Array,
        logit_scale: float = 100.0,
        *,
        sentences: Sequence[Array] | Array | None = None,
        **more: Any,
    ) -> Self:
        """See `FeatureMethod.fit_features`. `sentences`, (T_c, D) for each of the C classes, are what is attended to.

        Without them, each class's text feature is its only sentence.
        """
        own = [text[None] for text in text_features] if sentences is None else list(sentences)
        if len(own) != len(text_features):
            raise ClipadaptError(f"sentences are of {len(own)} classes and text_features of {len(text_features)}.")
        self._sentences = padded(own, text_features.shape[1])
        return super().fit_features(image_features, labels, text_features, logit_scale, **more)

    def _encoded(self, backbone: Backbone) -> tuple[Tensor, Tensor]:
        texts = class_texts(self.class_names_, self.templates)
        unique = list(dict.fromkeys(text for own in texts for text in own))
        features = encode_classes(backbone, unique, {text: text for text in unique})  # a sentence as its own class
        row = {text: i for i, text in enumerate(unique)}
        return padded([features[[row[text] for text in own]] for own in texts], backbone.dim)

    def _fit(self, support: Support, run: Run) -> None:
        unit_rows, there = self._sentences
        del self._sentences
        rows, dim = self.length * unit_rows, unit_rows.shape[2]
        weights = {name: w.requires_grad_() for name, w in initial(dim, self.reduction, self.seed).items()}
        steps = batches(len(support.images), self.batch_size, epochs=self.epochs, seed=self.seed)
        per_epoch = len(steps) // self.epochs

        def loss_of(step: tuple[int, Tensor]) -> Tensor:
            number, pictures = step
            kept = dropped(rows.shape[1], dim, self.seed, number)
            classes = class_features(weights, rows, there, self.ratio, kept)
            return cross_entropy(support.logit_scale * support.images[pictures] @ classes.T, support.labels[pictures])

        train(
            loss_of,
            torch.optim.SGD(weights.values(), lr=self.lr, momentum=0.9, weight_decay=5e-4),
            list(enumerate(steps)),
            schedule=lambda step: cosine_by_epoch(step, per_epoch, self.epochs, first=1e-5 / max(self.lr, 1e-5)),
            run=run,
        )
        self.adapter_ = {name: w.detach() for name, w in weights.items()}
        self.logit_scale_ = support.logit_scale
        self.weight_ = self._classifier(unit_rows, there)

    def _classifier(self, unit_rows: Tensor, there: Tensor) -> Tensor:
        classes = class_features(self.adapter_, self.length * unit_rows, there, self.ratio)
        return self.logit_scale_ * classes  # (C, D)

    def _logits(self, images: Tensor) -> Tensor:
        return images @ self.weight_.T  # (N, C)

    def _reclassify(self, backbone: Backbone) -> None:
        self.weight_ = self._classifier(*self._encoded(backbone))

    @property
    def trained_parameters(self) -> int:
        return sum(weight.numel() for weight in self.adapter_.values())
