"""VDT-Adapter (CLIP-A-self): self-attention over the sentences that describe a class, mixed back into each of them.

    h = LN(2 (r o + (1 - r) e))     o = softmax(e Wq (e Wk)' / sqrt(d)) e Wv Wo + b        e (T, D): a class's sentences
    logits = s x . unit(mean over the sentences of h)

Maniparambil et al., "Enhancing CLIP with GPT-4: Harnessing Visual Descriptions as Prompts" (arXiv 2307.11661), of which
only the abstract could be read; everything else is from the official repository mayug/VDT-Adapter: one head of width
D / 4, a residual ratio of 0.2 (tuned per data set), start values, drop-out of 0.1 on the attention and 0.5 on its
outcome, SGD at 2e-3 with momentum 0.9 and weight decay 5e-4, one image a step, 10 epochs, CoOp's schedule.

Descriptions come in as `templates`: a mapping from class to its own sentences, or a file with one. The official ones
are whole sentences that name the class ("Siamese is a cat with fur length that is short") and are encoded as they are;
the zero-shot part of the paper, the mean of their unit features, is the method `zero-shot` with the same `templates`.
Without descriptions the sentences are those of a template set, by default the seven of "imagenet-7". Classes may have
different numbers of sentences; the official code needs the same for all.

Departures: sentence features are given one `length`, where the official code takes those of CLIP as they come (the
softmax needs it: between unit vectors all scores are alike); of a step's drop-out, all classes share what is dropped,
so that their order does not matter; features are encoded once, without augmentation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear, normalize

from clipadapt.data import class_texts
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes
from clipadapt.methods import Classifier, FeatureMethod, Run, Support, TrainingData, hyper, method
from clipadapt.methods.tasks.classification import Array, unit
from clipadapt.training.loop import seeded
from clipadapt.training.schedules import cosine_by_epoch

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


@method(
    "vdt-adapter",
    title="Enhancing CLIP with GPT-4: Harnessing Visual Descriptions as Prompts",
    arxiv="2307.11661",
    trains="attention over sentences",
    requires=("texts",),
    new_classes=True,
)
class VdtAdapter(FeatureMethod, Classifier):
    """Self-attention over each class's sentences.

    >>> model = create("vdt-adapter", epochs=2).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    templates: Any = hyper("imagenet-7", "class descriptions (mapping or file), or templates as elsewhere")
    ratio: float = hyper(0.2, "share of the attention's outcome, in [0, 1] (official: 0.2; 0.5 once)", low=0, high=1)
    reduction: int = hyper(4, "D over the attention's width (official)", low=1)
    length: float = hyper(10.0, "of the sentence features; about that of CLIP's own", low=0)
    lr: float = hyper(2e-3, "SGD learning rate (official)", low=0)
    epochs: int = hyper(10, "passes over the support set (official)", low=1)
    batch_size: int = hyper(1, "images a step (official)", low=1)
    seed: int = hyper(1, "initial weights, drop-out and order of the images")

    search_space = {"ratio": (0.2, 0.5, 0.8), "lr": (2e-3, 0.02)}
    extras = {"sentences": "(T_c, D) features for each of the C classes; by default each class's text feature alone"}

    def _extras(self, model: Any, data: TrainingData | None) -> dict[str, Any]:
        texts = class_texts(self.class_names_, self.templates)
        unique = list(dict.fromkeys(text for own in texts for text in own))
        features = encode_classes(model, unique, {text: text for text in unique})  # a sentence as its own class
        row = {text: i for i, text in enumerate(unique)}
        return {"sentences": [features[[row[text] for text in own]] for own in texts]}

    def _fit(self, support: Support, run: Run) -> None:
        classes, dim = support.texts.shape
        sentences = support.extras.get("sentences")
        if sentences is None:
            units, there = support.texts[:, None], torch.ones(classes, 1, dtype=torch.bool)
        elif len(sentences) != classes:
            raise ClipadaptError(f"sentences are of {len(sentences)} classes and text_features of {classes}.")
        else:
            units, there = padded(sentences, dim)
        rows = self.length * units  # (C, T, D)
        weights = {name: w.requires_grad_() for name, w in initial(dim, self.reduction, self.seed).items()}

        def loss_of(step: tuple[int, Tensor]) -> Tensor:
            number, images = step
            kept = dropped(rows.shape[1], dim, self.seed, number)
            features = class_features(weights, rows, there, self.ratio, kept)
            return cross_entropy(support.logit_scale * support.images[images] @ features.T, support.labels[images])

        self._descend(
            loss_of,
            torch.optim.SGD(weights.values(), lr=self.lr, momentum=0.9, weight_decay=5e-4),
            support,
            run,
            schedule=lambda step, plan: cosine_by_epoch(
                step, plan.per_epoch, plan.epochs, first=1e-5 / max(self.lr, 1e-5)
            ),
            numbered=True,
        )
        self.adapter_ = {name: w.detach() for name, w in weights.items()}
        self.logit_scale_ = support.logit_scale
        self._classify(units, there)

    def _classify(self, units: Tensor, there: Tensor) -> None:
        features = class_features(self.adapter_, self.length * units, there, self.ratio)
        self.weight_ = self.logit_scale_ * features  # (C, D)

    def _reclassify(self, model: Any) -> None:
        self._classify(*padded(self._extras(model, None)["sentences"], model.dim))
