"""MAP: classes and images as sets of attributes, matched by optimal transport in addition to the usual cosine.

    t_ic = text(start, v_i1 .. v_iM, NAME_c, " with ", ATTRIBUTE_ic, end)                 i = 1 .. N, M = 4, N = 4
    logits_c = s ( mean_i <f, t_ic> + w OT(a_1 .. a_P; t_1c .. t_Nc) )                    all features unit
    OT = sum T cos,  T the cheapest plan for 1 - cos with equal weights, entropy 0.1      (Sinkhorn; T is a constant)

f is the image's feature. a_p are those of P learned tokens next to its patches; behind a middle block of the image
tower they are enhanced: by cross-attention to the (mapped) attribute features of the 10 classes nearest to the image.

Liu et al., "Multi-modal Attribute Prompting for Vision-Language Models" (arXiv 2403.00219). Only its abstract and the
repository llllx505/MAP were read. That repository names neither paper nor authors and is incomplete, but its parts are
those of the abstract; from it come the layout, the start words, P = N = 4, block 7 of 12, the 10 classes, the entropy,
w = 1, SGD 2e-3 as in CoOp, 20 epochs, batch 16, random crops (0.08-1) with flips.

Departures and own choices. The repository's transport runs on features that are not unit, where it is not finite and is
then left out; here they are unit. Its cross-attention file is missing: here one pre-norm transformer decoder layer
without self-attention, whose residual branches start at zero, so that training starts from plain visual prompts. Its
second, per-data-set regrouping of patches into prompts (GroupViT) is left out. "this is a", which is one token short of
M, is "this is a picture". A middle block is half of the depth in towers of other sizes than 12.

`attributes` are phrases that a language model wrote for each class. Without them every class gets the same GENERIC
phrases. They need no language model and tell no class from another, so much of the paper's gain cannot be expected.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clipadapt.backbones import Backbone
from clipadapt.data import class_texts
from clipadapt.methods import Classifier, PromptLearner, PromptMethod, Run, TrainingData, hyper, method
from clipadapt.methods.kinds.prompts import Batch
from clipadapt.nn.prompts import MEMORY, ClassPrompts, frame, random_vectors, visual_prompts, word_ids, word_vectors
from clipadapt.nn.transport import transport_similarity
from clipadapt.training.loop import Loss

GENERIC = ("a typical colour", "a typical shape", "a typical texture", "a typical size")
STARTS = ("a photo of a", "this is a photo", "this is a picture", "one picture of a")
TOGETHER = 1 << 18  # pairs of image and class that are matched at once


def described(backbone: Backbone, name: str, phrase: str | None, joiner: str, n_ctx: int) -> str:
    """NAME with PHRASE, less the last words that the text tower has no room for; "NAME." where nothing is left."""
    start, _ = frame(backbone)
    room = backbone.context_length - len(start) - 1 - n_ctx
    words = (phrase or "").split()
    while words:
        text = f"{name}{joiner}{' '.join(words)}"
        if len(word_ids(backbone, text.replace("_", " "))) <= room:
            return text
        words.pop()
    return f"{name}."


def first_context(backbone: Backbone, words: str, n_ctx: int) -> Tensor:
    """Start values (n_ctx, W): the first tokens of `words`, and random vectors where they are fewer."""
    vectors = word_vectors(backbone, words)[:n_ctx]
    return torch.cat([vectors, random_vectors(n_ctx - len(vectors), vectors.shape[1])])


class Enhancement(nn.Module):
    """Turns the prompt tokens of an image into what they become in view of the attributes of likely classes."""

    def __init__(self, dim: int, width: int, heads: int, hidden: int, top: int) -> None:
        super().__init__()
        self.top = top
        self.mapper = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm_prompts, self.norm_attributes, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        narrow = nn.Linear(4 * width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), narrow)
        for last in (self.attention.out_proj, narrow):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, prompts: Tensor, image: Tensor, attributes: Tensor) -> Tensor:
        """Hidden states (B, P, W), the image's (B, W) and attribute features (N, C, D) -> enhanced (B, P, W)."""
        mapped = self.mapper(attributes).transpose(0, 1)  # (C, N, W)
        nearness = normalize(image, dim=-1) @ normalize(mapped.mean(1), dim=-1).T  # (B, C)
        likely = nearness.topk(min(self.top, len(mapped)), dim=1).indices  # (B, k)
        seen = self.norm_attributes(mapped[likely].flatten(1, 2))  # (B, k * N, W)
        prompts = prompts + self.attention(self.norm_prompts(prompts), seen, seen, need_weights=False)[0]
        return prompts + self.feed_forward(self.norm(prompts))


class AttributeLearner(PromptLearner):
    """N contexts (N, M, W) for the classes' attributes, P visual prompts (P, W_v), and their enhancement."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        self.layer = len(backbone.blocks("vision")) // 2 if of.layer is None else of.layer
        backbone.layer_numbers("vision", [self.layer])  # refuses one that the tower lacks
        width, heads = backbone.width("vision"), backbone.model.config.vision_config.num_attention_heads
        self.enhancement = Enhancement(backbone.dim, width, heads, of.hidden, of.top)
        words = (STARTS[i % len(STARTS)] for i in range(of.n_attributes))
        self.context = nn.Parameter(torch.stack([first_context(backbone, start, of.n_ctx) for start in words]))
        self.visual = nn.Parameter(random_vectors(of.n_visual, width))
        self.prompts = []  # one for each of the N attributes
        for i in range(of.n_attributes):
            pairs = zip(class_names, of.phrases_, strict=True)
            texts = [described(backbone, c, dict(enumerate(p)).get(i), of.joiner, of.n_ctx) for c, p in pairs]
            self.prompts.append(ClassPrompts(backbone, texts, of.n_ctx, ending="", memory=MEMORY // of.n_attributes))
        self.known: Tensor | None = None  # what `texts` gives, once nothing is learned any more

    def texts(self) -> Tensor:
        """Attribute features (N, C, D), not of unit length: the enhancement takes them as they are."""
        pairs = zip(self.prompts, self.context, strict=True)
        return torch.stack([prompts.encode(context, normalize=False) for prompts, context in pairs])

    @property
    def image_dim(self) -> int:
        return (1 + len(self.visual)) * self.backbone.dim

    def images(self, pixels: Tensor) -> Tensor:
        """Unit features of the image and of its P attributes, one behind the other (B, (1 + P) * D)."""
        return self.images_among(pixels, self.texts() if self.known is None else self.known)

    def images_among(self, pixels: Tensor, texts: Tensor) -> Tensor:
        """`images` where the classes are those of `texts` (N, C, D)."""
        count, backbone = len(self.visual), self.backbone

        def enhance(hidden: Tensor) -> Tensor:
            patches, prompts = hidden[:, :-count], hidden[:, -count:]  # (B, 1 + h w, W), (B, P, W)
            image = patches[:, 0] if "class-token" in backbone.capabilities else patches.mean(1)
            return torch.cat([patches, self.enhancement(prompts, image, texts)], 1)

        with (
            backbone.inserted(vision=visual_prompts(self.visual)),
            backbone.after_blocks("vision", {self.layer: enhance}),
        ):
            out = backbone.encode_images(pixels, tokens=True)
        attributes = normalize(backbone.project_rows(out.inserted), dim=-1)  # (B, P, D)
        return torch.cat([out.pooled, attributes.flatten(1)], 1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, (1 + P) * D) and (N, C, D) -> (B, C)"""
        texts = normalize(texts, dim=-1)
        sets = texts.transpose(0, 1)  # (C, N, D)
        parts = images.unflatten(1, (-1, self.backbone.dim)).split(max(1, TOGETHER // len(sets)))
        similarities = [transport_similarity(part[:, None, 1:], sets, self.of.epsilon) for part in parts]  # (B, C) each
        return self.logit_scale * (
            images[:, : self.backbone.dim] @ texts.mean(0).T + self.of.weight * torch.cat(similarities)
        )

    def loss(self, batch: Batch) -> Loss:
        assert batch.pixels is not None
        texts = self.texts()
        logits = self.logits(self.images_among(batch.pixels, texts), texts)
        return cross_entropy(logits, batch.labels), logits.argmax(1) == batch.labels


@method(
    "map",
    title="Multi-modal Attribute Prompting for Vision-Language Models",
    arxiv="2403.00219",
    trains="context vectors, visual prompts and a cross-attention layer",
    requires={"texts", "patches", "prompts"},
    new_classes=True,
)
class Map(PromptMethod, Classifier):
    """Attribute prompts in both towers, matched by cosine and by optimal transport.

    >>> model = create("map", epochs=1, hidden=16, n_ctx=4).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    epochs: int | None = hyper(20, "passes over the support set (official code)", low=1)
    batch_size: int = hyper(16, "images a step (official code)", low=1)
    attributes: Any = hyper(None, "class -> phrases, or its .json file, by a language model; None: GENERIC for all")
    joiner: str = hyper(" with ", 'between class name and phrase (official; ", " for UCF101 and OxfordPets)')
    n_attributes: int = hyper(4, "N: phrases and contexts of a class; one that lacks phrases has its plain name", low=1)
    n_ctx: int = hyper(4, "M: context vectors of each phrase, started from STARTS", low=1)
    n_visual: int = hyper(4, "P: visual attribute prompts", low=1)
    layer: int | None = hyper(None, "block behind which they are enhanced, from 0; None: half of the depth", low=0)
    top: int = hyper(10, "nearest classes whose attributes enhance them (official code)", low=1)
    hidden: int = hyper(512, "width inside the map from text features to image tokens (ours)", low=1)
    weight: float = hyper(1.0, "w: weight of the transport similarity (official code)", low=0)
    epsilon: float = hyper(0.1, "entropy of the plan (official code)", low=1e-3)
    min_scale: float = hyper(0.08, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)

    learner = AttributeLearner

    def _learn(self, model: Backbone, data: TrainingData, run: Run) -> None:
        self.phrases_ = self._phrases()
        super()._learn(model, data, run)

    def _reclassify(self, model: Any) -> None:
        self.phrases_ = self._phrases()
        super()._reclassify(model)

    def _phrases(self) -> list[list[str]]:
        """The phrases of each class; kept with what was learned, so that a saved model does not need their file."""
        if self.attributes is None:
            return [list(GENERIC) for _ in self.class_names_]
        return class_texts(self.class_names_, self.attributes)

    def _use(self, learner: Any) -> None:
        super()._use(learner)
        learner.known = self._texts
