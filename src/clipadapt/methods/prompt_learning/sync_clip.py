"""SYNC-CLIP: real and generated pictures are two domains, each with tokens of its own beside tokens that both share.

    x = image(picture, [r; s])  real          g = image(picture, [d; s])  generated          t = text features
    min  CE(x t'; y)  +  a [ CE(g t'; y) + CE(g_new t'; y_new) ]  +  b mean_i [ p_i + relu(p_i - q_i) ]

(s x the logits, unit features.) A real picture counts among the classes that have real pictures, a generated one among
all. Beside each real picture, a generated one of its class is drawn (g) and one of a class without real pictures
(g_new), which moves the borders towards such classes. The last term aligns the domains: p_i is the mean absolute
difference between the features, not normalised, of g_i and of its real partner, q_i the least such difference to a
real picture of another class in the batch. Classes are predicted from the real domain's tokens [r; s].

Liu et al., "SYNC-CLIP: Synthetic Data Make CLIP Generalize Better in Data-Limited Scenarios" (arXiv 2312.03805). Of the
paper only the abstract was read; all details are those of the official repository XiaoBuL/SYNC-CLIP: both towers
prompted independently (IVLP), 4 vectors in texts from "a photo of a", 4 tokens in pictures of which the first 2 belong
to the domain, depth 9; SGD 2.5e-3, batch 8, 16 generated pictures of each class. It sets epochs, a and b for each data
set; the defaults are the medians of

    Caltech 20, .2, .5     DTD 10, .1, 1       EuroSAT 10, .1, 3.5     Aircraft 10, .2, 2
    Food 5, .2, .5         Flowers 20, 1, .5   ImageNet 5, .5, .5      Pets 10, .1, .5
    Cars 20, .2, .5        SUN 5, .1, .1       UCF 10, .1, .5

Departures: generated pictures are cropped anew at each step like real ones (officially once); a class that the source
lacks is left out of the terms that need it (officially a source has every class). Without a source there is only the
first term, which is IVLP on these settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, relu

from clipadapt.backbones import Backbone, Insertion
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.methods.base import Card, Run, hyper
from clipadapt.methods.prompt_learning.ivlp import IVLP, IndependentPrompts
from clipadapt.methods.prompt_method import Batch, PromptLearner
from clipadapt.methods.registry import register
from clipadapt.nn.prompts import deep_vectors, visual_prompts
from clipadapt.sources.images import image_source
from clipadapt.training.loop import Loss
from clipadapt.training.pixels import Pixels


def alignment(made: Tensor, real: Tensor, pairs: Tensor, labels: Tensor) -> Tensor:
    """Distance of generated pictures to their real partners, more where a picture of another class is nearer.

    made (P, D), real (B, D); pairs (P,) the partners' rows in `real`, labels (B,) of `real`
    """
    distance = (made[:, None] - real).abs().mean(2)  # (P, B)
    near = distance.gather(1, pairs[:, None])[:, 0]  # (P,)
    same = labels[pairs][:, None] == labels
    return (near + relu(near - distance.masked_fill(same, torch.inf).amin(1))).mean()


@dataclass(frozen=True)
class TwoDomains(Batch):
    """A batch with generated pictures: first those of the classes of real ones, then those of other classes.

    made         (M, 3, H, W) their pixels
    made_labels  (M,) int64
    pairs        (P,) which pictures of the batch the first P belong to
    """

    made: Tensor
    made_labels: Tensor
    pairs: Tensor


class DomainPrompts(IndependentPrompts):
    """Vectors in both towers; the first tokens of the image tower are replaced where a picture is generated."""

    made_weight, align_weight = 0.2, 0.5
    shown: Tensor | None = None  # (C,) bool: the classes with real pictures; None: all

    def __init__(self, *args: Any, generated: Sequence[Tensor]) -> None:
        super().__init__(*args)
        self.generated = nn.ParameterList(generated)  # (n, Wv) for each of the first blocks

    def generated_vision(self) -> list[Insertion]:
        """The tokens of the other domain: its own, and those that both share."""
        first, *deeper = (torch.cat([d, v[len(d) :]]) for d, v in zip(self.generated, self.visual, strict=True))
        return visual_prompts(first, deeper)

    def features(self, pixels: Tensor, vision: list[Insertion]) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalised."""
        with self.backbone.inserted(vision=vision):
            return self.backbone.encode_images(pixels, normalize=False)

    def terms(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms of the loss by name, and the real pictures' logits (B, C)."""
        assert batch.pixels is not None
        texts, real = self.texts(), self.features(batch.pixels, self.vision())
        logits = self.logits(normalize(real, dim=1), texts)
        if self.shown is not None:
            logits = logits.masked_fill(~self.shown, -torch.inf)
        terms = {"real": cross_entropy(logits, batch.labels)}
        if isinstance(batch, TwoDomains):
            made, count = self.features(batch.made, self.generated_vision()), len(batch.pairs)
            scores = self.logits(normalize(made, dim=1), texts)
            for name, part in (("generated", slice(count)), ("new", slice(count, None))):
                if len(scores[part]):
                    terms[name] = self.made_weight * cross_entropy(scores[part], batch.made_labels[part])
            if count:
                terms["align"] = self.align_weight * alignment(made[:count], real, batch.pairs, batch.labels)
        return terms, logits

    def loss(self, batch: Batch) -> Loss:
        terms, logits = self.terms(batch)
        return torch.stack(list(terms.values())).sum(), logits.argmax(1) == batch.labels


@register
@dataclass(kw_only=True)
class SyncClip(IVLP):
    """Learned vectors in both towers, for real pictures and for generated ones of old and new classes.

    `synthetic` says where generated pictures come from: a `Dataset` whose class names are those meant, a folder with
    one sub-folder per class, "playground", pictures drawn by clipadapt itself (`clipadapt.data.playground`), which
    knows few kinds of things and refuses others, or another source of `clipadapt.sources.images`. Its classes,
    `new_classes` and those of the support set are the classes of the fitted model. With None there are real pictures
    only. A saved model keeps the name of a data set or source, not the pictures.
    """

    synthetic: Any = hyper(None, 'generated pictures: a data set, a folder of classes, "playground", a source, or None')
    new_classes: list[str] = hyper([], "names of further classes, which have no real pictures")
    per_class: int = hyper(16, "pictures of each class that a source makes (official: 16 generated)", low=1)
    n_ctx: int = hyper(4, "vectors in a text (official)", low=1)
    n_visual: int = hyper(4, "tokens in a picture (official)", low=1)
    n_domain: int = hyper(
        2, "how many of them, from the first, are the domain's own; 0: one domain (official: 2)", low=0
    )
    depth: int = hyper(9, "blocks with vectors of their own, in each tower at most all (official)", low=1)
    lr: float = hyper(2.5e-3, "SGD learning rate, momentum 0.9, weight decay 5e-4 (official)", low=0)
    epochs: int | None = hyper(10, "passes over the support set (official: 5, 10 or 20)", low=1)
    batch_size: int = hyper(8, "real pictures a step, and up to twice as many generated ones (official)", low=1)
    made_weight: float = hyper(0.2, "a: weight of the generated pictures' labels (official: 0.1-1)", low=0)
    align_weight: float = hyper(0.5, "b: weight of the alignment (official: 0.1-3.5)", low=0)

    card = Card(
        key="sync-clip",
        title="SYNC-CLIP: Synthetic Data Make CLIP Generalize Better in Data-Limited Scenarios",
        arxiv="2312.03805",
        family="prompt-learning",
        task="few-shot classification",
        trains="context vectors and tokens in the image tower",
        signal="labels",
        requires=frozenset({"texts", "prompts", "gradients"}),
        new_classes=True,
    )
    tiny = {"lr": 0.02, "epochs": 20, "batch_size": 16, "min_scale": 1.0}

    def _learner(self, backbone: Backbone, class_names: Sequence[str]) -> PromptLearner:
        if self.n_domain > self.n_visual:
            raise ClipadaptError(f"n_domain = {self.n_domain} of n_visual = {self.n_visual} tokens are too many.")
        start = self._initial(backbone)
        generated = deep_vectors(backbone, "vision", self.n_domain, self.depth)
        learner = DomainPrompts(backbone, class_names, *start, generated=generated)
        learner.made_weight, learner.align_weight = self.made_weight, self.align_weight
        return learner

    def _source(self, backbone: Backbone, class_names: Sequence[str]) -> Dataset | None:
        """The generated pictures; a source that makes them makes those of `class_names`."""
        if self.synthetic is None:
            return None
        return image_source(self.synthetic).pictures(backbone, class_names, self.per_class, self.seed)

    def _identity(self, backbone: Backbone, support: Dataset, unlabelled: Any = None) -> str:
        made = self._source(backbone, [*support.class_names, *self.new_classes])
        pictures = [item.digest() for item in made.items] if made is not None else []
        facts = " ".join([super()._identity(backbone, support, unlabelled), *pictures])
        return blake2b(facts.encode(), digest_size=16).hexdigest()

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        made = self._source(backbone, [*support.class_names, *self.new_classes])
        others = dict.fromkeys([*self.new_classes, *(made.class_names if made is not None else [])])
        self.class_names_ = [*support.class_names, *(name for name in others if name not in support.class_names)]
        super()._fit_towers(backbone, replace(support, class_names=self.class_names_), val, run)

    def _train(self, learner: DomainPrompts, support: Dataset, run: Run) -> None:  # type: ignore[override]
        learner.shown = torch.tensor(support.counts, device=learner.backbone.device) > 0
        super()._train(learner, support, run)

    def _batches(self, backbone: Backbone, support: Dataset) -> Callable[[Tensor, int], Batch]:
        real, source = super()._batches(backbone, support), self._source(backbone, support.class_names)
        if source is None:
            return real
        made = torch.tensor([support.class_names.index(source.class_names[c]) for c in source.labels])
        rows_of = {c: (made == c).nonzero()[:, 0].tolist() for c in set(made.tolist())}
        new = sorted(rows_of.keys() - set(support.labels), key=lambda c: support.class_names[c])
        pixels = Pixels(backbone, source, min_scale=self.min_scale, seed=self.seed)

        def batch(rows: Tensor, epoch: int) -> Batch:
            seen = real(rows, epoch)
            chosen, pairs, unseen = [], [], []
            for i, row in enumerate(rows.tolist()):
                # shares in [0, 1) that depend on nothing but these three, so that a run that goes on draws the same
                partner, kind, other = np.random.default_rng([self.seed, epoch, row]).random(3)
                if support.labels[row] in rows_of:
                    chosen.append(_at(rows_of[support.labels[row]], partner))
                    pairs.append(i)
                if new:
                    unseen.append(_at(rows_of[_at(new, kind)], other))
            chosen += unseen
            if not chosen:
                return seen
            labels, where = made[chosen].to(backbone.device), torch.tensor(pairs, device=backbone.device)
            return TwoDomains(
                seen.rows, seen.labels, None, seen.pixels, pixels.batch(chosen, epoch), labels, where.long()
            )

        return batch


def _at(options: Sequence[int], share: float) -> int:
    return options[int(share * len(options))]
