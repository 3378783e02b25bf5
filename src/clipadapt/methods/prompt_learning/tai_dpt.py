"""TaI-DPT: sentences stand in for training images, as both towers share one space; two kinds of prompts are learned.

    global  p_c = <h, G_c>          local  P_c = sum_j softmax_j(tau a_jc) a_jc,   a_jc = <H_j, L_c>
    min over both contexts of  rank(4 p, y) + rank(4 P, y)            at test  logits = s (p + P) / 2

h is the feature of a sentence and H_j those of its tokens, each put through the projection; G and L are the class
features under the global and the local context. rank is the hinge over pairs of a class that the sentence names (y)
and one that it does not. At test h is the image's feature and H_j are its patches', so no image is learned from.

Guo et al., "Texts as Images in Prompt Tuning for Multi-Label Image Recognition" (arXiv 2211.12739). Read were the
abstract and the overview figure; all else is from the official repository guozix/TaI-DPT (`Caption_distill_double`):
16 vectors of each kind from N(0, 0.02), SGD 1e-4 (1e-3 for NUS-WIDE) over 20 epochs of batches of 512, tau 50 for
tokens and 40 for patches (4 for NUS-WIDE), margin 1 at four times the cosine, compound names before words, sentences
without a class dropped, template sentences of single classes (`templates`) next to the captions.

Departures. The repository has ResNets only, with the value path of their attention pool as patch features; here, as
MaskCLIP (arXiv 2112.01071) does it in transformers, patches attend to themselves only in the last block. The global
feature of an image keeps its positions. Words are matched with their plurals, not lemmatised. The last epoch is kept,
where the repository chooses one on test images. Without captions, sentences of two or three classes are made. s is
the backbone's own factor instead of 4, which ranks the same. Mixing in prompts learned from images is left out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from clipadapt.backbones import Backbone
from clipadapt.data import class_texts
from clipadapt.data.captions import made_sentences, named_classes, read_captions
from clipadapt.errors import ClipadaptError
from clipadapt.features import Adapted
from clipadapt.losses.ranking import FACTOR, pairwise_ranking
from clipadapt.methods import Classifier, PromptLearner, PromptMethod, Run, TrainingData, hyper, method
from clipadapt.nn.prompts import ClassPrompts, random_vectors, word_vectors
from clipadapt.training.loop import batches, train
from clipadapt.training.schedules import cosine_by_epoch


def local_scores(tokens: Tensor, texts: Tensor, sharpness: float, mask: Tensor | None = None) -> Tensor:
    """Cosines of tokens (B, L, D) with classes (C, D), averaged for each class over those that resemble it: (B, C)."""
    cosines = tokens @ texts.T  # (B, L, C)
    sharp = sharpness * cosines
    if mask is not None:  # (B, L), false where there is no token
        sharp = sharp.masked_fill(~mask[..., None], -torch.inf)
    return (sharp.softmax(1) * cosines).sum(1)


class Sentences:
    """S sentences with the classes they name, and their frozen features and their tokens', encoded once.

    targets (S, C) bool; pooled (S, D); tokens S times (L_s, D)
    """

    def __init__(self, backbone: Backbone, texts: Sequence[str], targets: Tensor, batch_size: int = 256) -> None:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together
        self.targets = targets[order].to(backbone.device)
        self.tokens: list[Tensor] = []
        pooled = []
        for first in range(0, len(order), batch_size):
            with torch.no_grad():
                ids = backbone.tokenize([texts[i] for i in order[first : first + batch_size]])
                out = backbone.encode_tokens(ids, tokens=True)
            pooled.append(out.pooled)
            self.tokens += [tokens[mask] for tokens, mask in zip(out.tokens, out.mask, strict=True)]
        self.pooled = torch.cat(pooled)

    def loss(self, rows: Tensor, classes: Tensor, sharpness: float) -> Tensor:
        """The loss of sentences (B,) under class features (2, C, D), global and local."""
        tokens = pad_sequence([self.tokens[i] for i in rows], batch_first=True)  # (B, L, D)
        mask = tokens.any(-1)  # unit rows; padding is zero
        whole = self.pooled[rows] @ classes[0].T
        parts = local_scores(tokens, classes[1], sharpness, mask)
        targets = self.targets[rows]
        return pairwise_ranking(FACTOR * whole, targets) + pairwise_ranking(FACTOR * parts, targets)


class DoubleLearner(PromptLearner):
    """A global and a local context for all classes, (2, 1, M, W)."""

    def __init__(self, of: Any, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__(of, backbone, class_names)
        if of.init:
            contexts = word_vectors(backbone, of.init).repeat(2, 1, 1, 1)
        else:
            contexts = random_vectors(2, 1, of.n_ctx, backbone.width("text"))
        self.contexts = nn.Parameter(contexts)
        self.prompts = ClassPrompts(backbone, class_names, contexts.shape[-2])

    def texts(self) -> Tensor:
        return self.prompts.encode(self.contexts)  # (2, C, D)


def sentences_of(of: Any, class_names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The S sentences to learn from, and (S, C) bool which classes each of them names."""
    order = sorted(range(len(class_names)), key=class_names.__getitem__)
    texts, named = [], []
    for c, own in zip(order, class_texts([class_names[c] for c in order], of.templates), strict=True):
        texts += own
        named += [frozenset({c})] * len(own)
    if of.captions is None:
        captions = made_sentences(class_names, of.sentences * len(class_names), of.seed)
    else:
        captions = read_captions(of.captions)
    found = named_classes(captions, class_names, of.synonyms)
    if not any(found):
        raise ClipadaptError(f"{of.card.key}: none of the captions names a class; synonyms may help.")
    texts += [caption for caption, classes in zip(captions, found, strict=True) if classes]
    named += [classes for classes in found if classes]
    targets = torch.zeros(len(texts), len(class_names), dtype=torch.bool)
    for row, classes in zip(targets, named, strict=True):
        row[list(classes)] = True
    return texts, targets


@method(
    "tai-dpt",
    title="Texts as Images in Prompt Tuning for Multi-Label Image Recognition",
    arxiv="2211.12739",
    problem="multi-label recognition",
    trains="global and local context vectors",
    signal="none",
    requires={"texts", "prompts", "patches", "attention"},
    new_classes=True,
    multi_label=True,
)
class TaIDPT(PromptMethod, Classifier):
    """Global and local context vectors learned from sentences; the images of a support set only set the threshold.

    For a multi-label model without any image, fit on `MultiLabelDataset([], [], class_names)`.

    >>> model = create("tai-dpt", epochs=1, sentences=5, n_ctx=4).fit(backbone, class_names=["red", "blue"])
    >>> model.predict_proba(queries).shape
    (8, 2)
    """

    captions: Any = hyper(None, "sentences to learn from: a list, or a .txt or .jsonl file; by default they are made")
    synonyms: Any = hyper(None, "further words by which captions name a class, {class name: [words]}")
    sentences: int = hyper(100, "sentences made for each class, where no captions are given", low=1)
    n_ctx: int = hyper(16, "context vectors M of each kind (official code)", low=1)
    init: str | None = hyper(None, 'words to start both contexts from, such as "a photo of a"; they set n_ctx')
    lr: float = hyper(1e-4, "SGD learning rate, momentum 0.9, weight decay 5e-4 (official code)", low=0)
    epochs: int | None = hyper(20, "passes over the sentences (official code)", low=1)
    batch_size: int = hyper(512, "sentences a step (official code)", low=1)
    token_sharpness: float = hyper(50.0, "tau of a sentence's tokens (official code)", low=0)
    patch_sharpness: float = hyper(40.0, "tau of an image's patches (official code; 4 for NUS-WIDE)", low=0)
    patch_attention: str = hyper(
        "identity", "of patches in the last block: to themselves (value path), to alike values, as trained",
        choices=("identity", "vv", "qk"),
    )  # fmt: skip
    local_share: float = hyper(0.5, "share of the local score in the logits (official code)", low=0, high=1)

    learner = DoubleLearner
    head = None  # logits take patches, too

    def _train(self, learner: Any, data: TrainingData, run: Run, **more: Any) -> None:
        sentences = Sentences(learner.backbone, *sentences_of(self, learner.class_names))
        epochs = self.epochs or 20
        steps = batches(len(sentences.tokens), self.batch_size, epochs=epochs, seed=self.seed)
        per_epoch = len(steps) // epochs
        train(
            lambda rows: sentences.loss(rows, learner.texts(), self.token_sharpness),
            torch.optim.SGD(learner.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4),
            steps,
            schedule=lambda step: cosine_by_epoch(step, per_epoch, epochs, 1e-5 / self.lr if self.lr else 0.0),
            run=run,
            **more,
        )

    @property
    def _scorer(self) -> Any:
        return Adapted(self.backbone_, self._scores, len(self.class_names_))  # keeps (B, C), not the patches

    def _scores(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C)."""
        backbone, (coarse, fine) = self._bound.backbone, self._texts
        scores = (1 - self.local_share) * backbone.encode_images(pixels) @ coarse.T
        if self.local_share:
            with backbone.attention(self.patch_attention):
                patches = backbone.encode_images(pixels, tokens=True).patches  # (B, N, D)
            scores = scores + self.local_share * local_scores(patches, fine, self.patch_sharpness)
        return backbone.logit_scale * scores

    def _logits(self, images: Tensor) -> Tensor:
        return images  # what `_scores` gives
