"""CapS-Adapter: TIP-X with a cache of captions next to that of images; captions of a few images of the target make
support images like them.

    A = (1 - delta) x K' + delta x G'        K: features of support images, G: of their captions
    logits = s x T' + alpha exp(-beta (1 - A)) Y - gamma c KL(p(x) | p(K)) Y

Wang et al., "CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification" (arXiv 2405.16591). Of the
paper the abstract was read; recipe, formulas and grid (alpha outermost, then beta, delta, gamma; ties go to the
first) are those of the official repository WLuLi/CapS-Adapter. p, c and Y are those of SuS-X (see `sus_x.py`, also for
`scaling`). The official code takes the softmax of p over the channels of the image's own feature, after a product
with the texts that it does not use: `signature="channels"`. Official captions are long (500 tokens at most, cut to what
the text tower takes). Cosines to texts are smaller than those to images, so a larger delta needs a larger alpha.

The recipe, of `fit(backbone, support or class_names=, unlabelled=)` with `source` and `captioner`:

1. The captioner describes the labelled images of `support` and the `unlabelled` ones, which count for the class that
   zero-shot CLIP sees. (Officially there are labelled ones only, picked from each class of the training set.)
2. Each description, behind the class's sentence of `templates`, is a prompt: "a photo of a cat. Asleep on a sofa".
3. The source makes images of these prompts, each with its prompt as caption, or has images without looking at them.
4. These and the labelled images are the support set. (Officially the labelled ones serve for captions alone, which
   here those given as `unlabelled` do.)

Without a source, unlabelled images are support images themselves, of the class that zero-shot CLIP sees. Captions
can be given instead of a captioner. Where an image has no caption, its class's text feature takes the place of one:
so without both, only names and images are used, and nothing is described.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clipadapt.data import Item, as_items, class_texts
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images
from clipadapt.methods import Classifier, FeatureMethod, Run, Support, TrainingData, hyper, method
from clipadapt.methods.tasks.classification import unit
from clipadapt.nn.signatures import common_range, divergence_classifier, log_signature, official_logits
from clipadapt.sources.captioners import Captioner, as_captioner, describe
from clipadapt.sources.images import support_of
from clipadapt.training.cache_search import best_signature_cache

BATCH = 10  # the official code's, which leaves its remainder out of the divergences
DELTAS = [i / 10 for i in range(11)]


def mixed(images: Tensor, keys: Tensor, texts: Tensor, delta: float) -> Tensor:
    """Affinities (M, N) of images (M, D) to support images (N, D) and to their captions (N, D), mixed."""
    return (1 - delta) * (images @ keys.T) + delta * (images @ texts.T)


def given_captions(given: Any, items: Sequence[Item], *, needed: bool) -> list[str | None]:
    """The captions of images that are `given` as a list in their order, or as a mapping from their names.

    Raises:
        ClipadaptError: a list does not fit the images, or a mapping lacks one where all are `needed`.
    """
    if given is None:
        return [None] * len(items)
    if isinstance(given, Mapping):
        missing = [item.name for item in items if item.name not in given]
        if missing and needed:
            raise ClipadaptError(f"caps-adapter: captions has none for {missing[0]!r}; add it, or give a captioner.")
        return [given.get(item.name) for item in items]
    found = list(given)
    if len(found) != len(items) or not all(isinstance(caption, str) for caption in found):
        raise ClipadaptError(
            f"caps-adapter: captions must be {len(items)} sentences, one for each labelled and then each unlabelled "
            "image, or a mapping from image names to sentences."
        )
    return found


def completed(captions: list[str | None], items: Sequence[Item], captioner: Captioner | None) -> list[str | None]:
    """N captions, in which the captioner, if there is one, describes the images that have none."""
    silent = [i for i, caption in enumerate(captions) if caption is None]
    if captioner is None or not silent:
        return captions
    said = dict(zip(silent, describe(captioner, [items[i] for i in silent]), strict=True))
    return [said.get(i, caption) for i, caption in enumerate(captions)]


def prompts_of(
    sentences: Mapping[str, str], labels: Sequence[str], captions: Sequence[str | None]
) -> dict[str, list[str]]:
    """Per class, its sentence with each caption of its images; the sentence alone where there is none."""
    told: dict[str, list[str]] = {name: [] for name in sentences}
    for name, caption in zip(labels, captions, strict=True):
        if caption is not None:
            told[name].append(f"{sentences[name]} {caption}")
    return {name: own or [sentences[name]] for name, own in told.items()}


def sentence_features(model: Any, sentences: Sequence[str | None]) -> Tensor:
    """Unit features (N, D) of N sentences; zeros where there is none."""
    known = sorted({sentence for sentence in sentences if sentence is not None}, key=lambda text: (len(text), text))
    with torch.no_grad():
        rows = [model.encode_texts(known[i : i + 256]).float().cpu() for i in range(0, len(known), 256)]
    table = torch.cat([torch.zeros(1, model.dim), *rows])
    row_of = {sentence: row for row, sentence in enumerate(known, start=1)}
    return table[[0 if sentence is None else row_of[sentence] for sentence in sentences]]


def signature(of: Any, images: Tensor) -> Tensor:
    """Log signatures (M, S): over classes, or over the D channels of the features themselves."""
    if of.signature == "channels":
        return (images.double() / of.temperature).log_softmax(dim=1)
    return log_signature(images, of.texts_, of.temperature)


def support_signatures(of: Any, delta: float) -> Tensor:
    """Those of the support (N, S), or (S, C) what of them is needed (see `nn.signatures.divergence_classifier`)."""
    keys = signature(of, of.keys_)
    if of.scaling == "official":
        return keys
    parts = [(1 - delta, of.keys_, of.keys_), (delta, of.keys_, of.captions_)]
    return common_range(keys, parts) * divergence_classifier(keys, of.values_)


def divergence_logits(of: Any, images: Tensor, affinity: Tensor, signatures: Tensor) -> Tensor:
    """Minus the scaled divergences summed by class (M, C); affinity (M, N) is that of `mixed`."""
    if of.scaling == "support":
        return (signature(of, images).exp() @ signatures).to(images.dtype)
    return official_logits(signature(of, images), signatures, of.values_, affinity, BATCH)


@method(
    "caps-adapter",
    title="CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification",
    arxiv="2405.16591",
    unlabelled=True,
)
class CapsAdapter(FeatureMethod, Classifier):
    """Caches of support images and of their captions; what is searched needs `val`.

    `captions` are those of the labelled and then the unlabelled images, as a list in their order, or a mapping from
    image names to sentences. `captioner` describes the others; it is what `clipadapt.sources.captioners.as_captioner`
    takes, and `source` is what `clipadapt.sources.images.as_image_source` takes. A saved model keeps the names of both.

    >>> model = create("caps-adapter", captioner="phrases").fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    alpha: float = hyper(1.0, "weight of the caches against zero-shot, >= 0 (official range: 0.1-50)", low=0)
    beta: float = hyper(5.5, "sharpness of the affinities, >= 0 (official range: 1-50)", low=0)
    gamma: float = hyper(1.0, "weight of the divergences, >= 0 (official range: 0.1-30)", low=0)
    delta: float = hyper(
        0.2, "share of the captions against the images, in [0, 1] (ours; official: searched)", low=0, high=1
    )
    temperature: float = hyper(0.5, "of signatures, divides cosines, > 0 (official)", low=1e-3)
    signature: str = hyper("classes", "what divergences are summed over", choices=("classes", "channels"))
    scaling: str = hyper("support", "where the range of divergences is taken from", choices=("support", "official"))
    captions: Any = hyper(None, "captions of the images: a list, or a mapping from their names to sentences")
    captioner: Any = hyper(
        None, 'what describes images: "phrases", a captioning model\'s folder or hub id, or a function'
    )
    source: Any = hyper(None, 'support images: a data set, a folder of classes, "playground", a source, or None')
    per_class: int = hyper(16, "images of each class that a source makes", low=1)
    seed: int = hyper(1, "of the images that a source makes")

    search_space = {"alpha": (1.0, 5.0, 20.0), "beta": (5.5, 20.0), "gamma": (0.1, 1.0, 5.0), "delta": (0.0, 0.2, 0.5)}

    extras = {"captions": "features (N + U, D) of the captions of labelled and unlabelled images; zeros for none"}

    @property
    def _signal(self) -> str:
        return super()._signal if self.source is None else "none"

    def _prepare(self, model: Any, data: TrainingData) -> TrainingData:
        names, found = data.class_names or [], as_items([] if data.unlabelled is None else data.unlabelled)
        images = [*data.support.items, *found]
        captioner = None if self.captioner is None else as_captioner(self.captioner, model)
        captions = completed(given_captions(self.captions, images, needed=captioner is None), images, captioner)
        if self.source is not None:
            texts = self._class_texts(model)
            seen = (encode_images(model, found).features @ texts.T).argmax(1).tolist()
            sentences = dict(zip(names, (own[0] for own in class_texts(names, self.templates)), strict=True))
            prompts = prompts_of(sentences, [names[label] for label in [*data.support.labels, *seen]], captions)
            made = support_of(self.source, model, names, self.per_class, self.seed, prompts)
            own = {prompt: prompt for prompts_of_class in prompts.values() for prompt in prompts_of_class}
            known = {**(self.captions if isinstance(self.captions, Mapping) else {}), **own}
            told = completed(given_captions(known, made.items, needed=False), made.items, captioner)
            captions = captions[: len(data.support)] + told
            data = replace(data.with_more(made), unlabelled=None)
        return replace(data, extras={"captions": sentence_features(model, captions)})

    def _fit(self, support: Support, run: Run) -> None:
        texts, labels, images = support.texts, support.labels, support.images
        if support.unlabelled is not None:
            images = torch.cat([images, support.unlabelled])
            labels = torch.cat([labels, (support.unlabelled @ texts.T).argmax(1)])
        if len(images) == 0:  # of fit_features: there is no backbone for a source
            raise ClipadaptError("caps-adapter: a source needs fit(backbone, ...); fit_features needs features.")
        given = support.extras.get("captions")
        captions = torch.zeros_like(images) if given is None else unit(given, "captions")
        if captions.shape != images.shape:
            raise ClipadaptError(f"captions must have shape {tuple(images.shape)}, not {tuple(captions.shape)}.")
        silent = captions.norm(dim=1, keepdim=True) == 0
        self.captions_ = torch.where(silent, texts[labels], captions)
        self.weight_, self.texts_ = support.logit_scale * texts, texts  # (C, D)
        self.keys_, self.values_ = images, one_hot(labels, len(texts)).to(images.dtype)  # (N, D), (N, C)
        self.alpha_, self.beta_, self.gamma_, self.delta_ = self.alpha, self.beta, self.gamma, self.delta
        if support.val is not None:
            x, y = support.val
            affinities = [mixed(x, self.keys_, self.captions_, delta) for delta in DELTAS]
            each = zip(DELTAS, affinities, strict=True)
            kl_logits = [
                divergence_logits(self, x, affinity, support_signatures(self, delta)) for delta, affinity in each
            ]
            *best, which = best_signature_cache(x @ self.weight_.T, affinities, self.values_, kl_logits, y)
            self.alpha_, self.beta_, self.gamma_, self.delta_ = *best, DELTAS[which]
        self.signatures_ = support_signatures(self, self.delta_)

    def _logits(self, images: Tensor) -> Tensor:
        affinity = mixed(images, self.keys_, self.captions_, self.delta_)  # (M, N)
        cache = (self.beta_ * affinity - self.beta_).exp() @ self.values_  # (M, C)
        kl_logits = divergence_logits(self, images, affinity, self.signatures_)
        return images @ self.weight_.T + self.alpha_ * cache + self.gamma_ * kl_logits
