"""X-MoRe: captions retrieved for an image classify it as well, and the surer of the two predictions weighs more.

    p = softmax(s x T')        q = mean over retrieved captions k of softmax(s c_k T')
    w(p) = 1 - H(p) / log C    prediction  (w(p) p + w(q) q) / (w(p) + w(q))

Eom et al., "Cross-Modal Retrieval Meets Inference: Improving Zero-Shot Classification with Cross-Modal Retrieval"
(arXiv 2308.15273). Read were the abstract and introduction; the formulas are those of the official repository
SeonghaEom/X-MoRe (`ensemble_with_entropy.py`, `create_cache.py`): the mean of the captions' probabilities, the entropy
of that mean, 16 captions, which are the best of those of 128 neighbouring images by the image's cosine with them.

Departures. The repository divides each weight by the running sum of its kind over the test stream, so that an image's
prediction depends on those before it: that is `mixing="stream"`, over the images of one call. It asks a service for
LAION-400M and ranks captions by another model (ViT-L/14); here one model does both, over a memory that the user gives.
It puts "a_photo_of_a " before each caption (`prefix`), and skips images for which too few captions were found.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from clipadapt.errors import ClipadaptError
from clipadapt.features.memory import encode_memory
from clipadapt.features.retrieval import nearest, top
from clipadapt.methods import Classifier, FeatureMethod, Run, Support, TrainingData, hyper, method
from clipadapt.methods.tasks.classification import unit

_BLOCK = 256  # images looked at together


def retrieve(images: Tensor, memory: Mapping[str, Tensor], k: int, candidates: int) -> tuple[Tensor, Tensor]:
    """The captions of images (N, D): their rows in `memory["texts"]` and which of these count, both (N, k').

    With images in the memory, only the captions of the `candidates` nearest ones come into question, each once.
    """
    if not len(memory["images"]):
        rows = nearest(images, memory["texts"], k)[1]
        return rows, torch.ones_like(rows, dtype=torch.bool)
    near = memory["text_of"][nearest(images, memory["images"], candidates)[1]]  # (N, P)
    texts, place = near.unique(return_inverse=True)  # ascending, so that the earlier caption wins a tie
    scores = (images @ memory["texts"][texts].T).masked_fill(
        ~torch.zeros(len(images), len(texts), dtype=torch.bool).scatter(1, place, True), -torch.inf
    )
    scores, columns = top(scores, k)
    return texts[columns], scores.isfinite()


def caption_prediction(rows: Tensor, counts: Tensor, captions: Tensor, weight: Tensor) -> Tensor:
    """Mean class probabilities (N, C) of captions (T, D) by `rows` (N, k) that count, (N, k) bool; weight (C, D).

    Each caption is classified once, however many images it was retrieved for.
    """
    used, place = rows.unique(return_inverse=True)
    probabilities = (captions[used] @ weight.T).softmax(dim=1)  # (U, C)
    shares = counts / counts.sum(dim=1, keepdim=True)
    return embedding_bag(place, probabilities, per_sample_weights=shares.to(probabilities.dtype), mode="sum")


def confidence(probabilities: Tensor) -> Tensor:
    """(N, C) -> (N, 1) in [0, 1]: 0 where all classes are equally likely, 1 where one is certain."""
    entropy = torch.special.entr(probabilities).sum(dim=1, keepdim=True)
    return (1 - entropy / math.log(probabilities.shape[1])).clamp(0, 1)


def mixed(image: Tensor, caption: Tensor, mixing: str) -> Tensor:
    """Two predictions (N, C) as one, whose rows sum to 1."""
    if mixing == "equal":
        return (image + caption) / 2
    first, second = (confidence(p).clamp(min=1e-6) for p in (image, caption))  # (N, 1)
    if mixing == "stream":
        first, second = first / first.cumsum(dim=0), second / second.cumsum(dim=0)
    return (first * image + second * caption) / (first + second)


@method(
    "x-more",
    title="Cross-Modal Retrieval Meets Inference: Improving Zero-Shot Classification with Cross-Modal Retrieval",
    arxiv="2308.15273",
    problem="zero-shot classification",
    signal="none",
    requires={"texts"},
    new_classes=True,
)
class XMoRe(FeatureMethod, Classifier):
    """Zero-shot classification by the image and by captions from an external memory; nothing is trained.

    `memory`: sentences (a list, or a .txt or .jsonl file), `clipadapt.data.image_pairs`, or a data set, whose classes'
    sentences are the captions.

    >>> model = create("x-more", memory=["a red star", "a blue sea"]).fit(backbone, class_names=["red", "blue"])
    >>> model.predict_proba(queries).shape
    (8, 2)
    """

    memory: Any = hyper(None, "captions to retrieve from: sentences, a file of them, pairs or a data set; needed")
    k: int = hyper(16, "captions retrieved for an image (official code)", low=1)
    candidates: int = hyper(
        128, "neighbouring images whose captions come into question, where the memory has any (official code)", low=1
    )
    mixing: str = hyper(
        "confidence", "weights: each prediction's confidence, the same over its running sum, or equal ones",
        choices=("confidence", "stream", "equal"),
    )  # fmt: skip
    prefix: str = hyper("", 'words put before each caption (official code: "a_photo_of_a ")')

    extras = {"memory": "features (T, D) of the captions to retrieve from; needed"}

    def _extras(self, model: Any, data: TrainingData) -> dict[str, Any]:
        if self.memory is None:
            raise ClipadaptError(
                "x-more: set memory, the captions to retrieve from: sentences, a file of them, pairs or a data set."
            )
        return {"memory": encode_memory(model, self.memory, self.templates, prefix=self.prefix)}

    def _fit(self, support: Support, run: Run) -> None:
        memory = support.extras.get("memory")
        if memory is None:
            raise ClipadaptError(
                "x-more: set memory, the captions to retrieve from; fit_features takes their features as memory=."
            )
        if not isinstance(memory, Mapping):
            texts = unit(memory, "memory", dim=support.texts.shape[1])
            memory = {"texts": texts, "images": texts[:0], "text_of": torch.empty(0, dtype=torch.int64)}
        if not len(memory["texts"]):
            raise ClipadaptError("x-more: the memory holds no caption.")
        self.memory_, self.weight_ = memory, support.logit_scale * support.texts  # (C, D)

    def predictions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities of images (N, D) by themselves and by their captions, both (N, C)."""
        parts = [images.new_empty(0, len(self.weight_))]
        for block in images.split(_BLOCK) if len(images) else ():
            rows, counts = retrieve(block, self.memory_, self.k, self.candidates)
            parts.append(caption_prediction(rows, counts, self.memory_["texts"], self.weight_))
        return (images @ self.weight_.T).softmax(dim=1), torch.cat(parts)

    def _logits(self, images: Tensor) -> Tensor:
        mixture = mixed(*self.predictions(images), self.mixing)
        return mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()  # (N, C), whose softmax is the mixture
