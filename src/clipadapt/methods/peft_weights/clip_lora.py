"""CLIP-LoRA: low-rank updates of the attention projections of both towers.

    W' = W + (alpha / sqrt(r)) B A        A (r, in), B (out, r), B = 0 at the start; all else is frozen

Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models" (arXiv 2405.18541), section 4; settings
from the official repository MaxZanella/CLIP-LoRA (r = 2, alpha = 1, queries, keys and values of every layer of both
towers, dropout 0.25 on the low-rank input, AdamW 2e-4 with weight decay 1e-2, cosine, 500 steps a shot, batch 32,
random resized crops of 8-100 % of the area). Departures: parts of a tower such as "up" follow its depth, where the
official lists are those of 12 blocks for every tower; one template instead of none ("a photo of a {}." is its
default too); the logit scale is the backbone's own, where the official code writes 100.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import unknown_name
from clipadapt.methods import Classifier, TrainingData, WeightMethod, hyper, method
from clipadapt.methods.kinds.weights import Outputs
from clipadapt.nn.updates import LowRank
from clipadapt.training.loop import batches
from clipadapt.training.schedules import cosine


def part_of_tower(part: str, depth: int) -> list[int]:
    """Numbers of the blocks of a part: of 12, "bottom" is 0-3, "mid" 4-7, "up" 8-11, "half-up" 6-11, "top3" 9-11."""
    third, two_thirds, half = round(depth / 3), round(2 * depth / 3), depth // 2
    parts = {
        "all": (0, depth),
        "bottom": (0, third),
        "mid": (third, two_thirds),
        "up": (two_thirds, depth),
        "half-bottom": (0, half),
        "half-up": (half, depth),
        **{f"top{n}": (max(depth - n, 0), depth) for n in (1, 2, 3)},
    }
    if part not in parts:
        raise unknown_name("part of a tower", part, parts)
    return list(range(*parts[part]))


def sites(model: Backbone, tower: str, kinds: Sequence[str], layers: Sequence[int] | str | None) -> list[str]:
    """Names of the linear layers that get an update; a part of a tower is one of its own depth."""
    names = []
    for one in ("text", "vision") if tower == "both" else (tower,):
        own = part_of_tower(layers, len(model.blocks(one))) if isinstance(layers, str) else layers
        names += model.target_modules(one, kinds, own)
    return names


@method(
    "clip-lora",
    title="Low-Rank Few-Shot Adaptation of Vision-Language Models",
    arxiv="2405.18541",
    trains="low-rank weights",
    new_classes=True,
)
class ClipLora(WeightMethod, Classifier):
    """Low-rank adaptation of the towers' attention, merged into the weights after training.

    >>> model = create("clip-lora", rank=2, steps_per_shot=1).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    rank: int = hyper(2, "rank r >= 1 of each update (paper: 2)", low=1)
    alpha: float = hyper(1.0, "the update is scaled by alpha / sqrt(r) (official)", low=0)
    tower: str = hyper("both", "which tower is adapted", choices=("both", "vision", "text"))
    kinds: Sequence[str] = hyper(("q", "k", "v"), "projections that get an update, of q, k, v, o, fc1, fc2")
    layers: Sequence[int] | str | None = hyper(
        None,
        "blocks that get an update: numbers, negative from the end, or a part of the tower: bottom, mid or up (a third "
        "each), half-bottom, half-up, top1, top2, top3, all (official); all by default",
    )
    dropout: float = hyper(0.25, "dropout on the low-rank input, in [0, 1) (official)", low=0, high=0.99)
    lr: float = hyper(2e-4, "AdamW learning rate (official)", low=0)
    steps_per_shot: int = hyper(500, "training steps for each shot (official)", low=1)
    batch_size: int = hyper(32, "images a step (official)", low=1)
    min_scale: float = hyper(0.08, "least area of the random crops, in (0, 1]; 1 is no augmentation", low=0.01, high=1)
    seed: int = hyper(1, "initial weights, dropout, crops and order of the images")

    weight_decay, clip_norm = 1e-2, None

    def _update(self, towers: Backbone, data: TrainingData) -> LowRank:
        where = sites(towers, self.tower, self.kinds, self.layers)
        return LowRank(towers.model, where, self.rank, self.alpha / self.rank**0.5, self.dropout)

    def _saved(self, model: Backbone) -> LowRank:
        where = sites(model, self.tower, self.kinds, self.layers)
        return LowRank.restore(self.update_, model.model, where, self.rank, self.alpha / self.rank**0.5)

    def _objective(self, out: Outputs) -> Tensor:
        return cross_entropy(out["scale"] * out["image"] @ out["classes"].T, out["labels"])

    def _steps(self, support: Dataset) -> list[Tensor]:
        total = self.steps_per_shot * max(support.counts)
        per_epoch = -(-len(support) // self.batch_size)
        return batches(len(support), self.batch_size, epochs=-(-total // per_epoch), seed=self.seed)[:total]

    def _schedule(self, step: int, total: int) -> float:
        return cosine(step, total, floor=1e-6 / self.lr)
