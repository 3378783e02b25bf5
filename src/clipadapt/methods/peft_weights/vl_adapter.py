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
into the weights, so the towers stay as they are and images are encoded with the adapters attached.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, Run, TrainingData, WeightMethod, hyper, method
from clipadapt.methods.kinds.weights import class_encoder
from clipadapt.nn.updates import SHARING, Bottlenecks
from clipadapt.training.loop import Loss, Report, batches, seeded, train
from clipadapt.training.pixels import Pixels


def linear(step: int, total: int, warmup: int) -> float:
    """Up to 1 in `warmup` steps, then down in a straight line that would reach 0 at `total`."""
    return (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)


def train_tasks(of: Any, model: Backbone, supports: Sequence[Any], run: Run) -> list[Bottlenecks]:
    """Train the adapters of all tasks, one for each support set; `of` has the hyper-parameters of `VlAdapter`."""
    towers = model.with_weights({})
    with seeded(of.seed):
        sets = [of.first(towers)]
        sets += [sets[0].for_another_task(of.tasks) for _ in supports[1:]]
    classifiers = [class_encoder(towers, data.class_names, of.templates) for data in supports]
    pixels = [Pixels(model, data, min_scale=of.min_scale, seed=of.seed) for data in supports]
    labels = [torch.tensor(data.labels, device=model.device) for data in supports]
    with torch.no_grad():
        frozen = [classes() for classes in classifiers]  # (C, D) each

    def loss_of(step: tuple[int, int, Tensor]) -> Loss:
        task, number, rows = step
        with sets[task].attached(towers.model):
            images = towers.encode_images(pixels[task].batch(rows, number))  # (B, D)
            texts = frozen[task] if of.tower == "vision" else classifiers[task]()  # (C, D)
        logits = towers.logit_scale * images @ texts.T
        return cross_entropy(logits, labels[task][rows]), logits.argmax(1) == labels[task][rows]

    steps = []  # of each task in its order, all tasks at the same pace
    for task, data in enumerate(supports):
        own = batches(len(data), of.batch_size, epochs=of.epochs, seed=of.seed)
        steps += [(number / len(own), task, number, rows) for number, rows in enumerate(own)]
    steps.sort(key=lambda step: step[:2])
    parameters = list(dict.fromkeys(p for update in sets for p in update.parameters()))
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-2},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    train(
        loss_of,
        torch.optim.AdamW(groups, lr=of.lr),
        [step[1:] for step in steps],
        schedule=lambda step: linear(step, len(steps), len(steps) // 10),
        clip_norm=of.clip_norm,
        run=run,
    )
    return sets


@method(
    "vl-adapter",
    title="VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks",
    arxiv="2112.06825",
    problem="few-shot classification, of several tasks at once",
    trains="bottleneck adapters in both towers",
    new_classes=True,
)
class VlAdapter(WeightMethod, Classifier):
    """Bottleneck adapters of both towers, for one task or shared by several."""

    reduction: float = hyper(8, "width of the hidden states / width of the bottleneck (official)", low=1)
    tower: str = hyper("both", "which tower is adapted", choices=("both", "vision", "text"))
    kinds: Sequence[str] = hyper(("o", "fc2"), "linear layers that an adapter stands behind, of q, k, v, o, fc1, fc2")
    layers: Sequence[int] | None = hyper(None, "blocks with adapters, negative from the end; all by default")
    sites: str = hyper("none", "what the adapters of one width share, in all blocks and towers", choices=SHARING)
    tasks: str = hyper("all", "what the tasks of `fit_tasks` share (paper: all)", choices=SHARING)
    lr: float = hyper(1e-3, "AdamW learning rate (official)", low=0)
    epochs: int = hyper(20, "passes over the support set (official)", low=1)
    batch_size: int = hyper(32, "images a step", low=1)
    min_scale: float = hyper(1.0, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)
    seed: int = hyper(1, "initial weights, crops and order of the images")

    clip_norm = 5.0

    def fit_tasks(self, backbone: Backbone, supports: Sequence[Dataset], *, report: Report | None = None) -> list[Self]:
        """Learn several tasks together, a batch of one after a batch of another; one fitted method for each.

        Itself stays unfitted. With `tasks` "all" the methods hold the same adapters, and differ in their classes.
        """
        if not supports:
            raise ClipadaptError("vl-adapter: fit_tasks needs at least one support set.")
        models, run = [replace(self) for _ in supports], Run(report)
        for model, support in zip(models, supports, strict=True):
            model._open(backbone, TrainingData.of(support, None, None, None, None))
        for model, update in zip(models, train_tasks(self, backbone, supports, run), strict=True):
            model._take(backbone, update)
            model.trained_ = update.count
        return models

    def _learn(self, model: Backbone, data: TrainingData, run: Run) -> None:
        (update,) = train_tasks(self, model, [data.support], run)
        self._take(model, update)

    def first(self, towers: Backbone) -> Bottlenecks:
        """The adapters of a task at their start values, which are drawn from torch's global stream."""
        sites = towers.target_modules(self.tower, self.kinds, self.layers)
        return Bottlenecks(towers.model, sites, reduction=self.reduction, share=self.sites)

    def _saved(self, model):
        sites = model.target_modules(self.tower, self.kinds, self.layers)
        return Bottlenecks.restore(self.update_, model.model, sites, reduction=self.reduction, share=self.sites)
