"""RECO: an embedding is refined by what a memory holds about its neighbours, in the other modality.

    v~ = F_image(v; texts of the k images nearest to v)        t~ = F_text(t; images of the k texts nearest to t)
    min over F of  NCE(v~, t~) + NCE(v~, t) + NCE(v, t~)         logits = s v~ . t~_c

Search stays within a modality, where a frozen model is good at it; fusion crosses modalities, where what is found adds
something. F is one transformer layer over the embedding and the k found ones, of which the first row is kept.

Iscen et al., "Retrieval-Enhanced Contrastive Vision-Text Models" (arXiv 2306.07196). Read were the abstract, the
overview figure's caption and the published reviews, which say all of the above; there is no official code. The paper
trains on CC12M with a memory of a billion pairs. Ours is the few-shot form:

* The memory is the support set, an image's text being its class's sentence, or one that the user gives. As the
  support set an image is left out where it is itself looked up: among its neighbours, and among the images of its
  class. A class's only image is not, for then its class would be missing.
* NCE has the texts of all classes as negatives, and the direction from image to text only: classes recur in a batch.
* The layer starts as the average of what it sees: queries of attention from zero; keys, values and output from the
  identity; the output times `start`; the second half of the layer from zero. With `start` 0 it starts as CLIP itself.
* Where nothing is found an embedding stays as it is.
"""

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, normalize, scaled_dot_product_attention

from clipadapt.errors import ClipadaptError
from clipadapt.features.memory import encode_memory
from clipadapt.features.retrieval import nearest
from clipadapt.methods import Classifier, FeatureMethod, Run, Support, TrainingData, hyper, method
from clipadapt.methods.tasks.classification import unit
from clipadapt.training.loop import seeded

_BLOCK = 512  # embeddings refined together


class Fusion(nn.Module):
    """The first row of one pre-norm transformer layer over an embedding and those found for it; the others are unused.

    Its values at the start are those of the module's docstring. Draws from torch's global stream.
    """

    def __init__(self, dim: int, heads: int, start: float) -> None:
        super().__init__()
        self.heads = gcd(dim, heads)
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        with torch.no_grad():
            for layer, size in ((self.q, 0.0), (self.k, 1.0), (self.v, 1.0), (self.out, start * dim**-0.5)):
                layer.weight.copy_(size * torch.eye(dim))  # normed rows have length dim ** 0.5
                layer.bias.zero_()
            self.down.weight.zero_()
            self.down.bias.zero_()

    def forward(self, x: Tensor, found: Tensor) -> Tensor:
        """Unit rows (B, D) and what was found for each (B, K, D) -> unit rows (B, D)."""
        if not found.shape[1]:
            return x
        rows = self.before(torch.cat([x[:, None], found], dim=1))  # (B, 1 + K, D)
        q, k, v = self.q(rows[:, :1]), self.k(rows), self.v(rows)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, ., D / heads)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]
        return normalize(x + self.down(gelu(self.up(self.between(x)))), dim=1)


def left_out(rows: Tensor, own: Tensor) -> Tensor:
    """Lists of neighbours (N, K), best first, without `own` (N,), or without the last where it is not among them."""
    return rows.gather(1, (rows == own[:, None]).int().sort(dim=1, stable=True).indices)[:, :-1]


def neighbours(
    support: Support, images: Tensor, texts: Tensor, k: int, own: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows of a memory (M, D), (M, D) for the training images (N, K), their own classes' texts (N, K), and the
    classes (C, K). With `own` the memory is the support set; otherwise classes' rows serve for images too (None).
    """
    of_classes = nearest(support.texts, texts, k + 1)[1]
    if not own:
        return nearest(support.images, images, k)[1], None, of_classes[:, :k]
    places = torch.arange(len(images))
    alone = torch.bincount(support.labels, minlength=len(support.texts))[support.labels] == 1
    places = places.masked_fill(alone, -1)
    rows = left_out(nearest(support.images, images, k + 1)[1], places)
    return rows, left_out(of_classes[support.labels], places), of_classes[:, :k]


def loss_of(v: Tensor, v2: Tensor, t: Tensor, t2: Tensor, own2: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Cross-entropies of images (B, D) with classes (C, D), original and refined (2), summed over three pairings.

    own2 (B, D) takes the place of `t2[labels]`: the refined texts that have not seen the image.
    """
    total = cross_entropy(scale * v2 @ t.T, labels)
    for images in (v2, v):
        right = (images * own2).sum(dim=1, keepdim=True)
        total = total + cross_entropy(scale * (images @ t2.T).scatter(1, labels[:, None], right), labels)
    return total


def refine(
    x: Tensor, modality: str, memory: Mapping[str, Tensor], learned: Mapping[str, Tensor], k: int, heads: int
) -> Tensor:
    """Unit features (N, D) of one modality, "image" or "text", fused with what `memory` holds about them: (N, D).

    `memory` has "images" and "texts" (M, D), `learned` the parameters of "image" and "text" `Fusion`s.
    """
    with torch.device("meta"):  # values come from what was learned; nothing is drawn
        fusion = Fusion(x.shape[1], heads, 0.0)
    own = f"{modality}."
    values = {name.removeprefix(own): p for name, p in learned.items() if name.startswith(own)}
    fusion.load_state_dict(values, assign=True)
    same, other = memory[f"{modality}s"], memory["texts" if modality == "image" else "images"]
    blocks = x.split(_BLOCK) if len(x) else ()
    with torch.no_grad():
        return torch.cat([x[:0], *(fusion(block, other[nearest(block, same, k)[1]]) for block in blocks)])


@method(
    "reco",
    title="Retrieval-Enhanced Contrastive Vision-Text Models",
    arxiv="2306.07196",
    trains="two fusion layers",
    new_classes=True,
)
class Reco(FeatureMethod, Classifier):
    """Images and class texts refined by a memory of image-text pairs; by default the support set.

    `memory`: `clipadapt.data.image_pairs`, or a data set, whose texts are the sentences of its classes.

    >>> model = create("reco", epochs=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    memory: Any = hyper(None, "pairs or a data set to retrieve from; by default the support set")
    k: int = hyper(10, "neighbours whose other half is fused", low=1)
    start: float = hyper(0.3, "weight of the neighbours' average before training; 0 starts as CLIP (ours)", low=0)
    heads: int = hyper(8, "attention heads, at most; a divisor of the features' length is taken", low=1)
    lr: float = hyper(1e-5, "AdamW learning rate (ours)", low=0)
    epochs: int = hyper(30, "passes over the support set (ours)", low=1)
    batch_size: int = hyper(64, "images a step (ours)", low=1)
    seed: int = hyper(1, "initial values and order of the images")

    search_space = {"start": (0.3, 1.0), "lr": (1e-5, 1e-4)}
    extras = {"memory": "features of pairs, images (M, D) and texts (M, D); by default the support set"}

    def _extras(self, model: Any, data: TrainingData) -> dict[str, Any]:
        if self.memory is None:
            return {}
        memory = encode_memory(model, self.memory, self.templates)
        if not len(memory["images"]) and len(memory["texts"]):
            raise ClipadaptError("reco needs images with their texts as its memory: pairs or a data set.")
        return {"memory": (memory["images"], memory["texts"][memory["text_of"]])}

    def _fit(self, support: Support, run: Run) -> None:
        v, t, y = support.images, support.texts, support.labels
        memory = support.extras.get("memory")
        own = memory is None
        if own and self.memory is not None:
            raise ClipadaptError(
                "reco: fit_features has no towers to encode a memory with; leave memory=None and give fit_features "
                "its features, memory=(images, texts)."
            )
        images, texts = (v, t[y]) if memory is None else memory  # (M, D), (M, D), row by row a pair
        if memory is not None and self.backbone_ is None:  # otherwise it is that of `_extras`, which has unit length
            images, texts = (unit(part, "memory", dim=v.shape[1]) for part in memory)
            if len(images) != len(texts):
                raise ClipadaptError(f"memory has {len(images)} images and {len(texts)} texts; it holds pairs.")
        with seeded(self.seed):
            fusions = nn.ModuleDict({name: Fusion(v.shape[1], self.heads, self.start) for name in ("image", "text")})
        if len(images) > own:  # a support set of one image leaves nothing to learn from
            near, of_own, of_classes = neighbours(support, images, texts, self.k, own)

            def step(rows: Tensor) -> Tensor:
                v2 = fusions["image"](v[rows], texts[near[rows]])
                t2 = fusions["text"](t, images[of_classes])
                labels = y[rows]
                own2 = t2[labels] if of_own is None else fusions["text"](t[labels], images[of_own[rows]])
                return loss_of(v[rows], v2, t, t2, own2, labels, support.logit_scale)

            self._descend(step, torch.optim.AdamW(fusions.parameters(), lr=self.lr), support, run)
        self.memory_, self.logit_scale_ = {"images": images, "texts": texts}, support.logit_scale
        self.fusion_ = {name: p.detach() for name, p in fusions.named_parameters()}
        self.weight_ = self.logit_scale_ * self.refined(t, "text")  # (C, D)

    def refined(self, x: Tensor, modality: str) -> Tensor:
        """Unit features of images or texts (N, D), `modality` "image" or "text", refined by the memory: (N, D)."""
        return refine(x, modality, self.memory_, self.fusion_, self.k, self.heads)

    def _reclassify(self, model: Any) -> None:
        self.weight_ = self.logit_scale_ * self.refined(self._class_texts(model), "text")  # (C, D)

    def _logits(self, images: Tensor) -> Tensor:
        return self.refined(images, "image") @ self.weight_.T  # (N, C)
