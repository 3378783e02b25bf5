"""Cross-modal linear probe: the class texts are training samples of a linear head, next to the images.

    logits = s x W'        min over W of CE over batches that are half images, half texts;  W starts at the texts

Lin et al., "Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models"
(arXiv 2301.06267): initialisation by class names, equal batches of both modalities, and weights
averaged with the zero-shot head as in WiSE-FT (ratio 0.5). From the official repository
linzhiqiu/cross_modal_adaptation: no bias; W is not normalised; AdamW, lr 1e-3 or 1e-4, 12,800 iterations, batches of
8 or 32; warm-up of 50 iterations, then half a cosine as long as the whole run, so that the rate does not quite reach
0; validation at every hundredth iteration, ties go to the first. Without `val` the last iteration counts.
Departures: one text row a class, the mean over its templates, instead of a row a template; no flipped view; the last
batch of a pass is kept where it is smaller.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipadapt.methods import Classifier, FeatureMethod, Run, Support, hyper, method
from clipadapt.training.loop import UNWATCHED, batches, train
from clipadapt.training.schedules import cosine

WARMUP, FIRST_LR, VALIDATE_EVERY = 50, 1e-5, 100


def zero_shot_head(texts: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Unit class means (C, D) of unit text rows (T, D) with labels (T,)."""
    sums = torch.zeros(classes, texts.shape[1], dtype=texts.dtype).index_add_(0, labels, texts)
    return normalize(sums, dim=1)


def mixed_batches(images: int, texts: int, batch_size: int, *, steps: int, seed: int) -> list[Tensor]:
    """Rows of [images; texts] for every step: half of a batch from each, both passed through in shuffled order."""
    half = max(batch_size // 2, 1)

    def rows(n: int, seed: int) -> list[Tensor]:
        per_pass = -(-n // half)
        return batches(n, half, epochs=-(-steps // per_pass), seed=seed)[:steps]

    return [torch.cat([i, images + t]) for i, t in zip(rows(images, seed), rows(texts, seed + 1), strict=True)]


def rate(step: int, steps: int, lr: float) -> float:
    """Factor on `lr` at a step: 1e-5 / lr, a line up to 1 at step 50, then half a cosine over `steps` steps."""
    if step == 0:
        return FIRST_LR / lr
    return step / WARMUP if step < WARMUP else cosine(step - WARMUP, steps)


def train_head(
    features: Tensor,
    labels: Tensor,
    head: Tensor,
    steps: list[Tensor],
    *,
    logit_scale: float,
    lr: float,
    weight_decay: float,
    val: tuple[Tensor, Tensor] | None = None,
    run: Run = UNWATCHED,
) -> tuple[Tensor, int]:
    """Train a copy of `head` (C, D) on rows of (R, D) features of any modality, with labels (R,).

    Returns the head and the step (from 0) after which it stood: the last, or the best on `val` (V, D), (V,).
    """
    weight = head.clone().requires_grad_()
    best = torch.tensor([-1.0, len(steps) - 1], dtype=torch.float64)  # accuracy and step
    kept = head.clone()

    def loss_of(rows: Tensor) -> Tensor:
        return cross_entropy(logit_scale * features[rows] @ weight.T, labels[rows])

    def validate(step: int) -> None:
        assert val is not None
        if step % VALIDATE_EVERY == 0:
            accuracy = ((val[0] @ weight.T).argmax(1) == val[1]).double().mean()
            if accuracy > best[0]:
                best[0], best[1] = accuracy, step
                kept.copy_(weight.detach())

    train(
        loss_of,
        torch.optim.AdamW([weight], lr=lr, weight_decay=weight_decay),
        steps,
        schedule=lambda step: rate(step, len(steps), lr),
        run=run,
        after_step=None if val is None else validate,
        state=[best, kept],
    )
    return weight.detach() if val is None else kept, int(best[1])


@method(
    "cross-modal-probe",
    title="Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models",
    arxiv="2301.06267",
    trains="linear head",
)
class CrossModalProbe(FeatureMethod, Classifier):
    """A linear head trained on images and class texts alike; `val`, where given, chooses the iteration.

    >>> model = create("cross-modal-probe", steps=4).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    lr: float = hyper(1e-3, "AdamW learning rate (official: 1e-3 or 1e-4)", low=FIRST_LR)
    weight_decay: float = hyper(0.01, "decoupled weight decay (official: 0, 1e-4 or 0.01)", low=0)
    batch_size: int = hyper(32, "rows a step, half images, half texts (official: 8 or 32)", low=2)
    steps: int = hyper(12800, "iterations (official)", low=1)
    wise_ft: float = hyper(0.0, "share of the zero-shot head in the result (the paper's variant: 0.5)", low=0, high=1)
    seed: int = hyper(1, "order of the rows")

    # The length of the run stands in for the paper's choice of an iteration on validation data.
    search_space = {"steps": (300, 1000), "wise_ft": (0.0, 0.5)}

    def _fit(self, support: Support, run: Run) -> None:
        classes = len(support.texts)
        head, _ = train_head(
            torch.cat([support.images, support.texts]),
            torch.cat([support.labels, torch.arange(classes)]),
            support.texts,
            mixed_batches(len(support.images), classes, self.batch_size, steps=self.steps, seed=self.seed),
            logit_scale=support.logit_scale,
            lr=self.lr,
            weight_decay=self.weight_decay,
            val=support.val,
            run=run,
        )
        self.weight_ = support.logit_scale * ((1 - self.wise_ft) * head + self.wise_ft * support.texts)  # (C, D)
