"""CoOp: the words around a class name become learned vectors; both towers stay frozen.

    t_c(V) = text(start, v_1 .. v_M, NAME_c, ".", end)        min over V of  CE(s x unit(t(V))', y)

Zhou et al., "Learning to Prompt for Vision-Language Models" (arXiv 2109.01134), section 3.2; layout, initial values
and optimiser from the official repository KaiyangZhou/CoOp (M = 16 from N(0, 0.02), SGD 2e-3 with momentum 0.9 and
weight decay 5e-4, cosine by epoch after one epoch at 1e-5, batch 32; 50 epochs for 1 shot, 100 for 2 and 4, 200 for
more). Departure: image features are encoded once, without random crops, so the image tower never runs in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone, Insertion
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_images
from clipadapt.methods.base import Card, Method, Report, hyper
from clipadapt.methods.registry import register
from clipadapt.training.loop import batches, train
from clipadapt.training.schedules import cosine


def prompt_layout(
    names: Sequence[Sequence[int]], n_ctx: int, position: str, *, start: list[int], period: list[int], end: int
) -> tuple[Tensor, Tensor]:
    """Token ids (C, L) of every class's prompt and the rows (C, n_ctx) that its context vectors take.

    `names` are the classes' token ids. The name stands behind the context ("end"), before it ("front"), or between
    its halves ("middle", the smaller half first); the period always stands before the end token. What the context
    rows hold is overwritten; rows after the end token are zero.
    """
    before = {"front": 0, "middle": n_ctx // 2, "end": n_ctx}[position]
    first, placeholder = len(start), names[0][0]
    ids, rows = [], []
    for name in names:
        after = first + before + len(name)
        ids.append([*start, *[placeholder] * before, *name, *[placeholder] * (n_ctx - before), *period, end])
        rows.append([*range(first, first + before), *range(after, after + n_ctx - before)])
    padded = [torch.tensor(row) for row in ids]
    return torch.nn.utils.rnn.pad_sequence(padded, batch_first=True), torch.tensor(rows).reshape(len(ids), n_ctx)


def encode_prompts(backbone: Backbone, ids: Tensor, rows: Tensor, context: Tensor) -> Tensor:
    """(C, L) ids whose `rows` (C, M) take the context, (M, W) or (C, M, W) -> unit text features (C, D)."""
    with backbone.inserted(text=[Insertion(context, at=rows)]):
        return backbone.encode_tokens(ids)


def frame(backbone: Backbone) -> tuple[list[int], int]:
    """The ids before a text (none in some families) and the end token's id."""
    *start, end = backbone.tokenize([""])[0].tolist()
    return start, end


def word_ids(backbone: Backbone, text: str) -> list[int]:
    """The token ids of a text without its start and end token."""
    start, end = frame(backbone)
    row = backbone.tokenize([text])[0].tolist()
    return row[len(start) : row.index(end)]


@register
@dataclass(kw_only=True)
class CoOp(Method):
    """Learned context vectors in front of (or around) the class names."""

    n_ctx: int = hyper(16, "context vectors M >= 1 (paper: 16; 4 in later work)", low=1)
    position: str = hyper("end", "where the class name stands", choices=("end", "middle", "front"))
    class_specific: bool = hyper(False, "a context of its own for each class (the paper's CSC)")
    init: str | None = hyper(None, 'words to start from, such as "a photo of a"; they set n_ctx')
    lr: float = hyper(2e-3, "SGD learning rate (paper)", low=0)
    epochs: int | None = hyper(
        None, "passes over the support set; by default the paper's 50, 100 or 200 by shots", low=1
    )
    batch_size: int = hyper(32, "pictures a step (paper)", low=1)
    seed: int = hyper(1, "initial context and order of the pictures")

    card = Card(
        key="coop",
        title="Learning to Prompt for Vision-Language Models",
        arxiv="2109.01134",
        family="prompt-learning",
        task="few-shot classification",
        trains="context vectors",
        signal="labels",
        requires=frozenset({"texts", "prompts"}),
    )
    tiny = {"init": "a photo of a", "class_specific": True, "epochs": 20, "lr": 0.3}

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, report: Report | None) -> None:
        images = encode_images(backbone, support).features.to(backbone.device)  # (N, D)
        labels = torch.tensor(support.labels, device=backbone.device)
        context = self._initial(backbone, len(support.class_names)).to(backbone.device).requires_grad_()
        ids, rows = self._prompts(backbone, support.class_names, context.shape[-2])

        def loss_of(batch: Tensor) -> Tensor:
            texts = encode_prompts(backbone, ids, rows, context)  # (C, D)
            return cross_entropy(backbone.logit_scale * images[batch] @ texts.T, labels[batch])

        shots = max(support.counts)
        epochs = self.epochs or (50 if shots == 1 else 100 if shots <= 4 else 200)
        steps = batches(len(images), self.batch_size, epochs=epochs, seed=self.seed)
        per_epoch = len(steps) // epochs

        def schedule(step: int) -> float:  # by epoch; the first one, at a rate of 1e-5, warms the momentum up
            epoch = step // per_epoch
            return 1e-5 / self.lr if epoch == 0 and epochs > 1 else cosine(max(epoch - 1, 0), epochs)

        optimizer = torch.optim.SGD([context], lr=self.lr, momentum=0.9, weight_decay=5e-4)
        train(loss_of, optimizer, steps, schedule=schedule, report=report)
        self.context_ = context.detach().cpu()  # (M, W) or (C, M, W)
        self._restore(backbone)

    def _restore(self, backbone: Backbone | None) -> None:
        self.backbone_ = backbone
        if backbone is not None:
            ids, rows = self._prompts(backbone, self.class_names_, self.context_.shape[-2])
            with torch.no_grad():
                texts = encode_prompts(backbone, ids, rows, self.context_.to(backbone.device)).cpu()
            self._weight = backbone.logit_scale * texts  # (C, D); not saved: the context says it all

    def _logits(self, images: Tensor) -> Tensor:
        return images @ self._weight.T  # (N, C)

    @property
    def trained_parameters(self) -> int:
        return self.context_.numel()

    def _initial(self, backbone: Backbone, classes: int) -> Tensor:
        if self.init is not None:
            words = torch.tensor(word_ids(backbone, self.init))
            context = backbone.embed_tokens(words).detach().clone().cpu()  # (M, W)
            return context.expand(classes, -1, -1).clone() if self.class_specific else context
        shape = (classes,) * self.class_specific + (self.n_ctx, backbone.width("text"))
        return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def _prompts(self, backbone: Backbone, class_names: Sequence[str], n_ctx: int) -> tuple[Tensor, Tensor]:
        start, end = frame(backbone)
        period = word_ids(backbone, ".")
        names = [word_ids(backbone, name.replace("_", " ")) for name in class_names]
        longest = max(range(len(names)), key=lambda c: len(names[c]))
        length = len(start) + len(names[longest]) + n_ctx + len(period) + 1
        if length > backbone.context_length:
            raise ClipadaptError(
                f"coop: {n_ctx} context vectors and the class name {class_names[longest]!r} make {length} tokens; "
                f"{backbone.source} takes {backbone.context_length}: choose a smaller n_ctx or a shorter name."
            )
        ids, rows = prompt_layout(names, n_ctx, self.position, start=start, period=period, end=end)
        return ids.to(backbone.device), rows.to(backbone.device)
