"""SAFT: fine-tune only the few weights on which the task's loss depends most, and leave all others as they are.

    g = gradient of the loss over the whole support set;  m = 1 where |g| is among the top share (0.1 %), else 0
    theta <- theta - rate * m * update        the mask m is chosen once, at the pre-trained weights

Nguyen et al., "SAFT: Towards Out-of-Distribution Generalization in Fine-Tuning" (arXiv 2407.03036). There is no
official code, and of the paper only the abstract was available: it gives the rule, the share, and that all else is
frozen. Ours are the loss (cross-entropy over the class texts, logit scale frozen), that the mask is chosen from both
towers together on plain images, AdamW without weight decay, the rate and the length. Only the chosen values are
parameters: the optimiser holds nothing else, and they are put into the weights for each forward pass, which is the same
as masking gradients. Saved are these values and their places.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.methods import Classifier, FineTuningMethod, TrainingData, hyper, method
from clipadapt.methods.kinds.weights import Outputs, class_encoder, tower_weights
from clipadapt.nn.updates import Full, Sparse
from clipadapt.training.pixels import Pixels


def chosen(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The places of the `count` highest scores of all tensors together: for each name, flat indices, ascending.

    Names without a place are left out.
    """
    best = torch.cat([score.flatten() for score in scores.values()]).topk(count).indices.sort().values  # (count,)
    places, start = {}, 0
    for name, score in scores.items():
        inside = best[(best >= start) & (best < start + score.numel())]
        if len(inside):
            places[name] = inside - start
        start += score.numel()
    return places


def gradient_scores(
    tower: Full, towers: Backbone, texts: Callable[[], Tensor], support: Dataset, batch_size: int
) -> dict[str, Tensor]:
    """|gradient| of the mean loss over the plain images, of every weight that `tower` trains."""
    pixels, labels = Pixels(towers, support, min_scale=1.0, seed=0), torch.tensor(support.labels)
    with tower.attached(towers.model):
        for rows in torch.arange(len(labels)).split(batch_size):
            logits = towers.logit_scale * towers.encode_images(pixels.batch(rows, 0)) @ texts().T  # (B, C)
            target = labels[rows].to(logits.device)
            (cross_entropy(logits, target, reduction="sum") / len(labels)).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.abs() for n, p in tower.by_name().items()}


def random_scores(tower: Full, seed: int) -> dict[str, Tensor]:
    """Uniform numbers in the place of gradients: the paper's ablation."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator).to(p.device) for n, p in tower.by_name().items()}


@method(
    "saft",
    title="SAFT: Towards Out-of-Distribution Generalization in Fine-Tuning",
    arxiv="2407.03036",
    problem="classification under distribution shift",
    trains="0.1 % of the weights",
    new_classes=True,
)
class Saft(FineTuningMethod, Classifier):
    """Sparse fine-tuning: a binary mask, chosen once by the gradient's magnitude, says which weights may move.

    >>> model = create("saft", epochs=1, share=0.01).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    share: float = hyper(0.001, "share of the weights that are trained, in (0, 1] (paper: 0.1 %)", low=1e-9, high=1)
    mask: str = hyper("gradient", "how they are chosen; random is the paper's ablation", choices=("gradient", "random"))
    tower: str = hyper("both", "which tower's weights they are chosen from", choices=("both", "vision", "text"))
    lr: float = hyper(1e-4, "AdamW learning rate (the paper's is not known)", low=0)

    search_space = {"lr": (1e-5, 1e-4, 1e-3)}
    weight_decay = 0.0

    def _update(self, towers: Backbone, data: TrainingData) -> Sparse:
        tower = Full(towers.model, tower_weights(towers, self.tower))
        if self.mask == "random":
            scores = random_scores(tower, self.seed)
        else:
            texts = class_encoder(towers, self.class_names_, self.templates)
            scores = gradient_scores(tower, towers, texts, data.support, self.batch_size)
        count = max(1, round(self.share * sum(score.numel() for score in scores.values())))
        return Sparse(towers.model, chosen(scores, count))

    def _saved(self, model: Backbone) -> Sparse:
        return Sparse.restore(self.update_, model.model)

    def _objective(self, out: Outputs) -> Tensor:
        return cross_entropy(out["scale"] * out["image"] @ out["classes"].T, out["labels"])
