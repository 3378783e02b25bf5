"""SYNC-CLIP: real and generated images are two domains, each with tokens of its own and tokens that both share.

    x = tower(image, [r; s])  real          g = tower(image, [d; s])  generated          t = text features
    min  CE(x t'; y)  +  a [ CE(g t'; y) + CE(g_new t'; y_new) ]  +  b mean_i [ p_i + relu(p_i - q_i) ]

(s x the logits, unit features.) A real image counts among the classes that have real images, a generated one among all.
For each real image, a generated one of its class is drawn (g) and one of a class without real images (g_new), which
moves the borders towards such classes. The last term aligns the domains: p_i is the mean absolute difference between
the features, not normalised, of g_i and of its real partner, q_i the least such difference to a real image of another
class in the batch. Classes are predicted from the real domain's tokens [r; s].

Liu et al., "SYNC-CLIP: Synthetic Data Make CLIP Generalize Better in Data-Limited Scenarios" (arXiv 2312.03805). Of the
paper only the abstract was read; all details are those of the official repository XiaoBuL/SYNC-CLIP: both towers
prompted independently (IVLP), 4 vectors in texts from "a photo of a", 4 tokens in images of which the first 2 belong
to the domain, depth 9; SGD 2.5e-3, batch 8, 16 generated images of each class. It sets epochs, a and b for each data
set; the defaults are the medians of

    Caltech 20, .2, .5     DTD 10, .1, 1       EuroSAT 10, .1, 3.5     Aircraft 10, .2, 2
    Food 5, .2, .5         Flowers 20, 1, .5   ImageNet 5, .5, .5      Pets 10, .1, .5
    Cars 20, .2, .5        SUN 5, .1, .1       UCF 10, .1, .5

Departures: generated images are cropped again at each step like real ones (officially once); a class that the source
lacks is left out of the terms that need it (officially a source has every class). Without a source there is only the
first term, which is IVLP on these settings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, relu

from clipadapt.backbones import Backbone, Insertion
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, Run, TrainingData, hyper, method
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.methods.kinds.tower_prompts import IndependentPrompts, TowerPromptMethod
from clipadapt.nn.prompts import deep_vectors, visual_prompts
from clipadapt.sources.images import as_image_source
from clipadapt.training.loop import Loss
from clipadapt.training.pixels import Pixels


def alignment(made: Tensor, real: Tensor, pairs: Tensor, labels: Tensor) -> Tensor:
    """Distance of generated images to their real partners, more where an image of another class is nearer.

    made (P, D), real (B, D); pairs (P,) the partners' rows in `real`, labels (B,) of `real`
    """
    distance = (made[:, None] - real).abs().mean(2)  # (P, B)
    near = distance.gather(1, pairs[:, None])[:, 0]  # (P,)
    same = labels[pairs][:, None] == labels
    return (near + relu(near - distance.masked_fill(same, torch.inf).amin(1))).mean()


@dataclass(frozen=True)
class TwoDomains(Batch):
    """A batch with generated images: first those of the classes of real ones, then those of other classes.

    Attributes:
        made: (M, 3, H, W) their pixels.
        made_labels: (M,) int64.
        pairs: (P,) which images of the batch the first P belong to.
    """

    made: Tensor
    made_labels: Tensor
    pairs: Tensor


class DomainPrompts(IndependentPrompts):
    """Vectors in both towers; the first tokens of the image tower are replaced where an image is generated."""

    shown: Tensor | None = None  # (C,) bool: the classes with real images; None: all

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        if of.n_domain > of.n_visual:
            raise ClipadaptError(f"n_domain = {of.n_domain} of n_visual = {of.n_visual} tokens are too many.")
        self.generated = nn.ParameterList(deep_vectors(backbone, "vision", of.n_domain, of.depth))  # each (n, Wv)

    def generated_vision(self) -> list[Insertion]:
        """The tokens of the other domain: its own, and those that both share."""
        first, *deeper = (torch.cat([d, v[len(d) :]]) for d, v in zip(self.generated, self.visual, strict=True))
        return visual_prompts(first, deeper)

    def features(self, pixels: Tensor, vision: list[Insertion]) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalised."""
        with self.backbone.inserted(vision=vision):
            return self.backbone.encode_images(pixels, normalize=False)

    def terms(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms of the loss by name, and the real images' logits (B, C)."""
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
                    terms[name] = self.of.made_weight * cross_entropy(scores[part], batch.made_labels[part])
            if count:
                terms["align"] = self.of.align_weight * alignment(made[:count], real, batch.pairs, batch.labels)
        return terms, logits

    def loss(self, batch: Batch) -> Loss:
        terms, logits = self.terms(batch)
        return torch.stack(list(terms.values())).sum(), logits.argmax(1) == batch.labels


@method(
    "sync-clip",
    title="SYNC-CLIP: Synthetic Data Make CLIP Generalize Better in Data-Limited Scenarios",
    arxiv="2312.03805",
    trains="context vectors and tokens in the image tower",
    new_classes=True,
)
class SyncClip(TowerPromptMethod, Classifier):
    """Learned vectors in both towers, for real images and for generated ones of old and new classes.

    `synthetic` says where generated images come from: a `Dataset` whose class names are those meant, a folder with
    one sub-folder per class, "playground", images drawn by clipadapt itself (`clipadapt.data.playground`), which
    knows few kinds of things and refuses others, or another source of `clipadapt.sources.images`. Its classes,
    `new_classes` and those of the support set are the classes of the fitted model. With None there are real images
    only. A saved model keeps the name of a data set or source, not the images.

    >>> model = create("sync-clip", epochs=1).fit(backbone, support)
    >>> model.with_classes(["red", "dog"]).predict_proba(queries).shape
    (8, 2)
    """

    synthetic: Any = hyper(None, 'generated images: a data set, a folder of classes, "playground", a source, or None')
    new_classes: list[str] = hyper([], "names of further classes, which have no real images")
    per_class: int = hyper(16, "images of each class that a source makes (official: 16 generated)", low=1)
    n_ctx: int = hyper(4, "vectors in a text (official)", low=1)
    n_visual: int = hyper(4, "tokens in an image (official)", low=1)
    n_domain: int = hyper(
        2, "how many of them, from the first, are the domain's own; 0: one domain (official: 2)", low=0
    )
    depth: int = hyper(9, "blocks with vectors of their own, in each tower at most all (official)", low=1)
    lr: float = hyper(2.5e-3, "SGD learning rate, momentum 0.9, weight decay 5e-4 (official)", low=0)
    epochs: int | None = hyper(10, "passes over the support set (official: 5, 10 or 20)", low=1)
    batch_size: int = hyper(8, "real images a step, and up to twice as many generated ones (official)", low=1)
    made_weight: float = hyper(0.2, "a: weight of the generated images' labels (official: 0.1-1)", low=0)
    align_weight: float = hyper(0.5, "b: weight of the alignment (official: 0.1-3.5)", low=0)

    learner = DomainPrompts

    def _prepare(self, model: Backbone, data: TrainingData) -> TrainingData:
        known: list[str] = list(data.class_names or [])
        source = None if self.synthetic is None else as_image_source(self.synthetic, model)
        made = None if source is None else source([*known, *self.new_classes], self.per_class, self.seed)
        others = dict.fromkeys([*self.new_classes, *(made.class_names if made is not None else [])])
        names = self.class_names_ = [*known, *(name for name in others if name not in known)]
        extras = {} if made is None else {"made": made}
        return replace(data, support=replace(data.support, class_names=names), class_names=names, extras=extras)

    def _train(self, learner: Any, data: TrainingData, run: Run, **more: Any) -> None:
        learner.shown = torch.tensor(data.support.counts, device=learner.backbone.device) > 0
        super()._train(learner, data, run, **more)

    def _batches(self, backbone: Backbone, data: TrainingData) -> Callable[[Tensor, int], Batch]:
        real, support, source = super()._batches(backbone, data), data.support, data.extras.get("made")
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
