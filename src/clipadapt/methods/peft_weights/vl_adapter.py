"""VL-Adapter: bottleneck adapters in frozen towers, of which several tasks can share one set.

    y <- y + up(gelu(down(y)))        y: what attention and MLP of every block give, before they are added to the rows

Sung et al., "VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks" (arXiv 2112.06825), whose
best form is one adapter for all tasks; of the paper only the abstract could be read. From the official repository
ylsung/VL_adapter (`single_adapter.sh`): the tanh form of GELU, widths divided by 8, AdamW at 1e-3 (3e-4 for an adapter
a task) with weight decay 0.01 on matrices, a linear schedule with a tenth of warm-up, gradient norm at most 5, 20
epochs; each block has its own adapters, which tasks share wholly, by one half, or not at all.

Departures: there the adapters stand in a language model that reads frozen CLIP features, the norms of that model are
trained too, and a batch has 500 examples. Here they stand in CLIP's own two towers, the loss is cross-entropy over the
class texts, norms stay as they are, and `up` is zero at the start, so that training starts at zero-shot. A task is a
data set with classes of its own: `fit` learns one, `fit_tasks` several. Adapters are not linear and cannot be merged
into the weights, so the towers stay as they are and pictures are encoded with the adapters attached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods.base import Card, Method, Run, hyper
from clipadapt.methods.registry import register
from clipadapt.methods.tower_method import class_encoder
from clipadapt.nn.adapters import SHARING, Adapters, bottlenecks, for_another_task, learned, put_back
from clipadapt.training.loop import Loss, Report, batches, seeded, train
from clipadapt.training.pixels import Pixels


def linear(step: int, total: int, warmup: int) -> float:
    """Up to 1 in `warmup` steps, then down in a straight line that would reach 0 at `total`."""
    return (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)


@register
@dataclass(kw_only=True)
class VlAdapter(Method):
    """Bottleneck adapters of both towers, for one task or shared by several."""

    reduction: float = hyper(8, "width of the rows / width of the bottleneck (official)", low=1)
    tower: str = hyper("both", "which tower is adapted", choices=("both", "vision", "text"))
    kinds: Sequence[str] = hyper(("o", "fc2"), "linear layers that an adapter stands behind, of q, k, v, o, fc1, fc2")
    layers: Sequence[int] | None = hyper(None, "blocks with adapters, negative from the end; all by default")
    sites: str = hyper("none", "what the adapters of one width share, in all blocks and towers", choices=SHARING)
    tasks: str = hyper("all", "what the tasks of `fit_tasks` share (paper: all)", choices=SHARING)
    lr: float = hyper(1e-3, "AdamW learning rate (official)", low=0)
    epochs: int = hyper(20, "passes over the support set (official)", low=1)
    batch_size: int = hyper(32, "pictures a step", low=1)
    min_scale: float = hyper(1.0, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)
    seed: int = hyper(1, "initial weights, crops and order of the pictures")

    card = Card(
        key="vl-adapter",
        title="VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks",
        arxiv="2112.06825",
        family="peft-weights",
        task="few-shot classification, of several tasks at once",
        trains="bottleneck adapters in both towers",
        signal="labels",
        requires=frozenset({"texts", "weights"}),
        new_classes=True,
    )
    tiny = {"lr": 3e-3, "epochs": 12, "batch_size": 16}

    def fit_tasks(self, backbone: Backbone, supports: Sequence[Dataset], *, report: Report | None = None) -> list[Self]:
        """Learn several tasks together, a batch of one after a batch of another; one fitted method for each.

        Itself stays unfitted. With `tasks` "all" the methods hold the same adapters, and differ in their classes.
        """
        if not supports:
            raise ClipadaptError("vl-adapter: fit_tasks needs at least one support set.")
        models = [replace(self) for _ in supports]
        opened: list[Any] = [m._open(backbone, data, None) for m, data in zip(models, supports, strict=True)]
        self._learn(backbone, models, opened, Run(report))
        return models

    def _fit_towers(self, backbone: Backbone, support: Dataset, val: Dataset | None, run: Run) -> None:
        self._learn(backbone, [self], [support], run)

    def _learn(self, backbone: Backbone, models: Sequence[Self], supports: Sequence[Dataset], run: Run) -> None:
        """Train the adapters of all tasks, one for each of `models`, and leave them there."""
        with seeded(self.seed):
            sets = [self._adapters(backbone)]
            sets += [for_another_task(sets[0], self.tasks).to(backbone.device) for _ in supports[1:]]
        classifiers = [class_encoder(backbone, data.class_names, self.templates) for data in supports]
        pixels = [Pixels(backbone, data, min_scale=self.min_scale, seed=self.seed) for data in supports]
        labels = [torch.tensor(data.labels, device=backbone.device) for data in supports]
        with torch.no_grad():
            frozen = [classes() for classes in classifiers]  # (C, D) each

        def loss_of(step: tuple[int, int, Tensor]) -> Loss:
            task, number, rows = step
            with sets[task].attached(backbone.model):
                images = backbone.encode_images(pixels[task].batch(rows, number))  # (B, D)
                texts = frozen[task] if self.tower == "vision" else classifiers[task]()  # (C, D)
            logits = backbone.logit_scale * images @ texts.T
            return cross_entropy(logits, labels[task][rows]), logits.argmax(1) == labels[task][rows]

        steps = []  # of each task in its order, all tasks at the same pace
        for task, data in enumerate(supports):
            own = batches(len(data), self.batch_size, epochs=self.epochs, seed=self.seed)
            steps += [(number / len(own), task, number, rows) for number, rows in enumerate(own)]
        steps.sort(key=lambda step: step[:2])
        parameters = list(dict.fromkeys(p for adapters in sets for p in adapters.parameters()))
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-2},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        train(
            loss_of,
            torch.optim.AdamW(groups, lr=self.lr),
            [step[1:] for step in steps],
            schedule=lambda step: linear(step, len(steps), len(steps) // 10),
            clip_norm=5.0,
            run=run,
        )
        for model, adapters in zip(models, sets, strict=True):
            model._keep(backbone, adapters)

    def _keep(self, backbone: Backbone, adapters: Adapters) -> None:
        self.adapters_: dict[str, Tensor] = learned(adapters)
        self._restore(backbone)

    def _adapters(self, backbone: Backbone) -> Adapters:
        """New adapters, which draw from torch's global stream."""
        names = backbone.target_modules(self.tower, self.kinds, self.layers)
        return bottlenecks(backbone.model, names, reduction=self.reduction, share=self.sites).to(backbone.device)

    def _restore(self, backbone: Backbone | None) -> None:
        assert backbone is not None  # it is never fitted on features alone
        self.backbone_, self._logit_scale = backbone, backbone.logit_scale
        with seeded(self.seed):  # start values are made and thrown away
            self._attachable = put_back(self._adapters(backbone), self.adapters_)
        with self.attached():
            self._texts = encode_classes(backbone, self.class_names_, self.templates)  # (C, D); the adapters say it all

    @contextmanager
    def attached(self) -> Iterator[Backbone]:
        """The backbone, whose encodings are the adapted ones while it lasts."""
        backbone = self._fitted("backbone_")
        with self._attachable.attached(backbone.model):
            yield backbone

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """See `Method.encode_pixels`; the image tower has its adapters."""
        with self.attached() as backbone:
            return backbone.encode_images(pixels)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """See `Method.encode_texts`; the text tower has its adapters."""
        with self.attached() as backbone:
            return backbone.encode_texts(texts)

    def _beside_image_tower(self) -> dict[str, Tensor]:
        return self.adapters_

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """See `Method.image_logits`; the features are those of the image tower with its adapters, and not kept."""
        with self.attached() as backbone:
            encoded = encode_images(backbone, images, cache=False, on_error=on_error, progress=progress)
        with torch.no_grad():
            return self._logits(encoded.features), encoded.kept

    def _logits(self, images: Tensor) -> Tensor:
        return self._logit_scale * images @ self._texts.T  # (N, C)

    @property
    def trained_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.adapters_.values())
