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
from clipadapt.methods.kinds.weights import Outputs
from clipadapt.nn.updates import SHARING, Bottlenecks
from clipadapt.training.loop import Loss, Report, seeded, train


def linear(step: int, total: int, warmup: int) -> float:
    """Up to 1 in `warmup` steps, then down in a straight line that would reach 0 at `total`."""
    return (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)


def fit_together(tasks: Sequence[Any], model: Backbone, supports: Sequence[Dataset], run: Run) -> list[Any]:
    """Fit the tasks, unfitted `VlAdapter` methods with the same settings, to one support set each; returns them.

    A batch of one task follows a batch of another, and all go through their images at the same pace.
    """
    if not tasks:
        raise ClipadaptError("vl-adapter: fit_tasks needs at least one support set.")
    data = [TrainingData.of(support, None, None, None, None) for support in supports]
    for task, own in zip(tasks, data, strict=True):
        task._open(model, own)
    of, towers = tasks[0], model.with_weights({})
    with seeded(of.seed):
        updates = [of._update(towers, data[0])]
        updates += [updates[0].for_another_task(of.tasks) for _ in tasks[1:]]
    lessons = []
    for task, update, support in zip(tasks, updates, supports, strict=True):
        with update.attached(towers.model):
            lessons.append(task._lesson(towers, model, support))

    def loss_of(step: tuple[float, int, tuple[int, Tensor]]) -> Loss:
        _, number, own = step
        with updates[number].attached(towers.model):
            return lessons[number].loss_of(own)

    steps = [
        (place / len(lesson.steps), number, step)
        for number, lesson in enumerate(lessons)
        for place, step in enumerate(lesson.steps)
    ]
    train(
        loss_of,
        of._optimizer(list(dict.fromkeys(p for update in updates for p in update.parameters()))),
        sorted(steps, key=lambda step: step[:2]),
        schedule=lambda step: of._schedule(step, len(steps)),
        clip_norm=of.clip_norm,
        run=run,
    )
    for task, update in zip(tasks, updates, strict=True):
        task._take(model, update)
        task.trained_ = update.count
    return list(tasks)


@method(
    "vl-adapter",
    title="VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks",
    arxiv="2112.06825",
    problem="few-shot classification, of several tasks at once",
    trains="bottleneck adapters in both towers",
    new_classes=True,
)
class VlAdapter(WeightMethod, Classifier):
    """Bottleneck adapters of both towers, for one task or shared by several.

    >>> model = create("vl-adapter", epochs=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

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

    weight_decay, clip_norm = 1e-2, 5.0

    def fit_tasks(self, backbone: Backbone, supports: Sequence[Dataset], *, report: Report | None = None) -> list[Self]:
        """Learn several tasks together, a batch of one after a batch of another; one fitted method for each.

        Itself stays unfitted. With `tasks` "all" the methods hold the same adapters, and differ in their classes.
        """
        return fit_together([replace(self) for _ in supports], backbone, supports, Run(report))

    def _update(self, towers: Backbone, data: TrainingData) -> Bottlenecks:
        sites = towers.target_modules(self.tower, self.kinds, self.layers)
        return Bottlenecks(towers.model, sites, reduction=self.reduction, share=self.sites)

    def _saved(self, model: Backbone) -> Bottlenecks:
        sites = model.target_modules(self.tower, self.kinds, self.layers)
        return Bottlenecks.restore(self.update_, model.model, sites, reduction=self.reduction, share=self.sites)

    def _objective(self, out: Outputs) -> Tensor:
        return cross_entropy(out["scale"] * out["image"] @ out["classes"].T, out["labels"])

    def _optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr)

    def _schedule(self, step: int, total: int) -> float:
        return linear(step, total, warmup=total // 10)
