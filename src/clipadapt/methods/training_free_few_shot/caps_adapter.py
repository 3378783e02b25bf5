"""CapS-Adapter: TIP-X with a cache of captions beside that of pictures; captions of a few pictures of the target make
support pictures like them.

    A = (1 - delta) x K' + delta x G'        K: features of support pictures, G: of their captions
    logits = s x T' + alpha exp(-beta (1 - A)) Y - gamma c KL(p(x) | p(K)) Y

Wang et al., "CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification" (arXiv 2405.16591). Of the
paper the abstract was read; recipe, formulas and grid (alpha outermost, then beta, delta, gamma; the first of equals
wins) are those of the official repository WLuLi/CapS-Adapter. p, c and Y are those of SuS-X (see `sus_x.py`, also for
`scaling`). The official code takes the softmax of p over the channels of the picture's own feature, after a product
with the texts that it does not use: `signature="channels"`. Official captions are long (500 tokens at most, cut to what
the text tower takes). Cosines to texts are smaller than those to pictures, so a larger delta needs a larger alpha.

The recipe, of `fit(backbone, support or class_names=, unlabelled=)` with `source` and `captioner`:

1. The captioner describes the labelled pictures of `support` and the `unlabelled` ones, which count for the class that
   zero-shot CLIP sees. (Officially there are labelled ones only, picked from each class of the training set.)
2. Each description, behind the class's sentence of `templates`, is a prompt: "a photo of a cat. Asleep on a sofa".
3. The source makes pictures of these prompts, each with its prompt as caption, or has pictures without looking at them.
4. These and the labelled pictures are the support set. (Officially the labelled ones serve for captions alone, which
   here those given as `unlabelled` do.)

Without a source, unlabelled pictures are support pictures themselves, of the class that zero-shot CLIP sees. Captions
can be given instead of a captioner. Where a picture has no caption, its class's text feature takes the place of one:
so without both, nothing but names and pictures is used, and nothing is described.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset, Item, as_items, class_texts
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods.base import Array, Card, FeatureMethod, Run, Support, hyper, unit
from clipadapt.methods.registry import register
from clipadapt.methods.training_free_few_shot.sus_x import (
    common_range,
    divergence,
    divergence_classifier,
    joined,
    log_signature,
    official_affinity,
    search,
)
from clipadapt.sources.captioners import describe
from clipadapt.sources.images import support_of

BATCH = 10  # the official code's, which leaves its remainder out of the divergences
DELTAS = [i / 10 for i in range(11)]


def mixed(images: Tensor, keys: Tensor, texts: Tensor, delta: float) -> Tensor:
    """Affinities (M, N) of pictures (M, D) to support pictures (N, D) and to their captions (N, D), mixed."""
    return (1 - delta) * (images @ keys.T) + delta * (images @ texts.T)


@register
@dataclass(kw_only=True)
class CapsAdapter(FeatureMethod):
    """Caches of support pictures and of their captions; what is searched needs `val`.

    `captions` are those of the labelled and then the unlabelled pictures, as a list in their order, or a mapping from
    picture names to sentences. `captioner` describes the others: a function from a list of PIL pictures to sentences,
    or the folder or hub id of an image-to-text model (see `clipadapt.sources.captioners`). `source` is what
    `clipadapt.sources.images.image_source` takes. A saved model keeps the names of both.
    """

    alpha: float = hyper(1.0, "weight of the caches against zero-shot, >= 0 (official range: 0.1-50)", low=0)
    beta: float = hyper(5.5, "sharpness of the affinities, >= 0 (official range: 1-50)", low=0)
    gamma: float = hyper(1.0, "weight of the divergences, >= 0 (official range: 0.1-30)", low=0)
    delta: float = hyper(
        0.2, "share of the captions against the pictures, in [0, 1] (ours; official: searched)", low=0, high=1
    )
    temperature: float = hyper(0.5, "of signatures, divides cosines, > 0 (official)", low=1e-3)
    signature: str = hyper("classes", "what divergences are summed over", choices=("classes", "channels"))
    scaling: str = hyper("support", "where the range of divergences is taken from", choices=("support", "official"))
    captions: Any = hyper(None, "captions of the pictures: a list, or a mapping from their names to sentences")
    captioner: Any = hyper(None, "what describes pictures: a function, or an image-to-text model's folder or hub id")
    source: Any = hyper(None, 'support pictures: a data set, a folder of classes, "playground", a source, or None')
    per_class: int = hyper(16, "pictures of each class that a source makes", low=1)
    seed: int = hyper(1, "of the pictures that a source makes")

    card = Card(
        key="caps-adapter",
        title="CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification",
        arxiv="2405.16591",
        family="training-free-few-shot",
        task="few-shot classification",
        trains="nothing",
        signal="labels",
        unlabelled=True,
    )
    search_space = {"alpha": (1.0, 5.0, 20.0), "beta": (5.5, 20.0), "gamma": (0.1, 1.0, 5.0), "delta": (0.0, 0.2, 0.5)}

    def _check_signal(self, n_labelled: int, n_unlabelled: int) -> None:
        super()._check_signal(n_labelled or int(self.source is not None), n_unlabelled)

    # -- pictures and their captions --------------------------------------------------------------------------------

    def _fit_towers(
        self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run, unlabelled: Any = None
    ) -> None:
        names, found = support.class_names, as_items([] if unlabelled is None else unlabelled)
        described = self._described([*support.items, *found])
        if self.source is not None:
            texts = encode_classes(backbone, names, self.templates)
            seen = (encode_images(backbone, found).features @ texts.T).argmax(1).tolist()
            prompts: dict[str, list[str]] = {name: [] for name in names}
            for label, caption in zip([*support.labels, *seen], described, strict=True):
                if caption is not None:
                    prompts[names[label]].append(caption)
            for name, (sentence, *_) in zip(names, class_texts(names, self.templates), strict=True):
                prompts[name] = [f"{sentence} {caption}" for caption in prompts[name]] or [sentence]
            made = support_of(self.source, backbone, names, self.per_class, self.seed, prompts)
            described = described[: len(support)] + self._described(made.items, prompts)
            support, unlabelled = joined(support, made), None
        self.captions_ = _sentence_features(backbone, described)
        super()._fit_towers(backbone, support, val, run, unlabelled)

    def _described(self, items: list[Item], prompts: Mapping[str, list[str]] | None = None) -> list[str | None]:
        """A caption of each picture: the prompt that it was made of, the one given, the captioner's, or none."""
        given, made = self.captions, {prompt for own in (prompts or {}).values() for prompt in own}
        if given is None or isinstance(given, Mapping) or prompts is not None:
            known = given if isinstance(given, Mapping) else {}
            found = [item.name if item.name in made else known.get(item.name) for item in items]
        else:
            found = list(given)
            if len(found) != len(items) or not all(isinstance(caption, str) for caption in found):
                raise ClipadaptError(
                    f"caps-adapter: captions must be {len(items)} sentences, one for each labelled and then each "
                    "unlabelled picture, or a mapping from picture names to sentences."
                )
        silent = [i for i, caption in enumerate(found) if caption is None]
        if self.captioner is not None:
            for i, caption in zip(silent, describe(self.captioner, [items[i] for i in silent]), strict=True):
                found[i] = caption
        elif silent and given is not None and prompts is None:
            name = items[silent[0]].name
            raise ClipadaptError(f"caps-adapter: captions has none for {name!r}; add it, or give a captioner.")
        return found

    def fit_features(
        self,
        image_features: Array,
        labels: Any,
        text_features: Array,
        *rest: Any,
        captions: Array | None = None,
        **more: Any,
    ) -> Self:
        """As `FeatureMethod.fit_features`; `captions` (N + U, D) are features of the pictures' captions.

        N labelled pictures come first, then U unlabelled ones. A row of zeros is no caption.
        """
        self.captions_ = torch.empty(0) if captions is None else unit(captions, "captions")
        return super().fit_features(image_features, labels, text_features, *rest, **more)

    # -- features ---------------------------------------------------------------------------------------------------

    def _fit(self, support: Support, run: Run) -> None:
        texts, labels, images = support.texts, support.labels, support.images
        if support.unlabelled is not None:
            images = torch.cat([images, support.unlabelled])
            labels = torch.cat([labels, (support.unlabelled @ texts.T).argmax(1)])
        if len(images) == 0:  # of fit_features: there is no backbone for a source
            raise ClipadaptError("caps-adapter: a source needs fit(backbone, ...); fit_features needs features.")
        if self.captions_.numel() == 0:
            self.captions_ = torch.zeros_like(images)
        if self.captions_.shape != images.shape:
            raise ClipadaptError(f"captions must have shape {tuple(images.shape)}, not {tuple(self.captions_.shape)}.")
        silent = self.captions_.norm(dim=1, keepdim=True) == 0
        self.captions_ = torch.where(silent, texts[labels], self.captions_)
        self.weight_, self.texts_ = support.logit_scale * texts, texts  # (C, D)
        self.keys_, self.values_ = images, one_hot(labels, len(texts)).to(images.dtype)  # (N, D), (N, C)
        self.alpha_, self.beta_, self.gamma_, self.delta_ = self.alpha, self.beta, self.gamma, self.delta
        if support.val is not None:
            x, y = support.val
            affinities = [mixed(x, self.keys_, self.captions_, delta) for delta in DELTAS]
            kl_logits = [self._kl_logits(x, delta, self._signatures(delta)) for delta in DELTAS]
            *best, which = search(x @ self.weight_.T, affinities, self.values_, kl_logits, y)
            self.alpha_, self.beta_, self.gamma_, self.delta_ = *best, DELTAS[which]
        self.signatures_ = self._signatures(self.delta_)

    def _signature(self, images: Tensor) -> Tensor:
        """Log signatures (M, S): over classes, or over the D channels of the features themselves."""
        if self.signature == "channels":
            return (images.double() / self.temperature).log_softmax(dim=1)
        return log_signature(images, self.texts_, self.temperature)

    def _signatures(self, delta: float) -> Tensor:
        """Those of the support (N, S), or (S, C) what of them is needed (see `sus_x.divergence_classifier`)."""
        keys = self._signature(self.keys_)
        if self.scaling == "official":
            return keys
        parts = [(1 - delta, self.keys_, self.keys_), (delta, self.keys_, self.captions_)]
        return common_range(keys, parts) * divergence_classifier(keys, self.values_)

    def _kl_logits(self, images: Tensor, delta: float, signatures: Tensor) -> Tensor:
        if self.scaling == "support":
            return (self._signature(images).exp() @ signatures).to(images.dtype)  # (M, C)
        affinity = mixed(images, self.keys_, self.captions_, delta)  # (M, N)
        if len(images) == 0:
            return affinity @ self.values_
        divergences = divergence(self._signature(images), signatures)  # (M, N)
        low, high = float(affinity.min()), float(affinity.max())
        return official_affinity(divergences, low, high, BATCH).to(images.dtype) @ self.values_

    def _logits(self, images: Tensor) -> Tensor:
        affinity = mixed(images, self.keys_, self.captions_, self.delta_)  # (M, N)
        cache = (self.beta_ * affinity - self.beta_).exp() @ self.values_  # (M, C)
        kl_logits = self._kl_logits(images, self.delta_, self.signatures_)
        return images @ self.weight_.T + self.alpha_ * cache + self.gamma_ * kl_logits


def _sentence_features(backbone: Backbone, sentences: list[str | None]) -> Tensor:
    """Unit features (N, D) of N sentences; zeros where there is none."""
    known = sorted({sentence for sentence in sentences if sentence is not None}, key=lambda text: (len(text), text))
    with torch.no_grad():
        rows = [backbone.encode_texts(known[i : i + 256]).float().cpu() for i in range(0, len(known), 256)]
    table = torch.cat([torch.zeros(1, backbone.dim), *rows])
    row_of = {sentence: row for row, sentence in enumerate(known, start=1)}
    return table[[0 if sentence is None else row_of[sentence] for sentence in sentences]]
