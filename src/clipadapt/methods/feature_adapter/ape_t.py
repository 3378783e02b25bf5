"""APE-T: one learned residual a class, on the channels that matter, moves both its text and its cached images.

    min over R, w of  CE(s S (T + R)' + alpha * exp(-beta (1 - S (S + Y R)')) (Y * w), y)        S = support features

R (C, D) is zero outside the channels of the largest criterion (see `ape`); w (N,) weighs the cache entries. Zhu et
al., "Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement" (arXiv 2304.01195), section 3.3;
optimiser, schedule and start values from the official repository yangyangyang127/APE (channels from the texts alone
with b = 0.2; R = 0, w = 1; moved texts and keys keep their length; AdamW 1e-3, eps 1e-3, weight decay 0.1, cosine to 0
over 20 epochs, batch 256, alpha 2, beta 1; affinities on all channels).

The official script keeps the epoch that is best on validation data (for ImageNet, on test data): `epoch="val"`; the
last one counts by default. With `val`, beta and alpha are searched afterwards, as there. Departure: features are
encoded once, without augmentation.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipadapt.methods import Classifier, Run, Support, hyper, method
from clipadapt.methods.kinds.caches import CacheMethod
from clipadapt.nn.cache import cache_logits
from clipadapt.nn.channels import best_channels, criterion
from clipadapt.training.cache_search import best_cache
from clipadapt.training.search import best_on


@method(
    "ape-t",
    title="Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement",
    arxiv="2304.01195",
    trains="category residuals and cache weights",
)
class ApeT(CacheMethod, Classifier):
    """Category residuals on refined channels; needs `val` only for `epoch="val"` and for searching alpha and beta.

    >>> model = create("ape-t", epochs=2).fit(backbone, support)
    >>> model.predict_proba(queries).shape
    (8, 4)
    """

    alpha: float = hyper(2.0, "weight of the cache against zero-shot, >= 0 (official start value)", low=0)
    beta: float = hyper(1.0, "sharpness of the affinities, >= 0 (official start value)", low=0)
    share: float = hyper(
        500 / 1024, "share of channels trained, in [0, 1]; at least one (official: 0.49-0.88)", low=0, high=1
    )
    balance: float = hyper(0.2, "weight of similarity against variance, in [0, 1] (official)", low=0, high=1)
    lr: float = hyper(1e-3, "AdamW learning rate (paper; official for ImageNet: 1e-4)", low=0)
    epochs: int = hyper(20, "passes over the support set (official: 20 to 30)", low=1)
    batch_size: int = hyper(256, "images a step (official)", low=1)
    epoch: str = hyper("last", "which epoch's residuals to keep", choices=("last", "val"))
    seed: int = hyper(1, "order of the images")

    search_space = {"alpha": (2.0, 7.0, 20.0), "beta": (1.0, 3.0)}

    def _fit(self, support: Support, run: Run) -> None:
        images, labels, texts = support.images, support.labels, support.texts
        channels = best_channels(criterion(texts, texts, self.balance), self.share)  # (Q,)
        residual = torch.zeros(len(texts), len(channels), requires_grad=True)  # (C, Q)
        entry_weight = torch.ones(len(images), 1, requires_grad=True)

        def moved(residual: Tensor, entry_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The classifier (C, D), keys (N, D) and values (N, C)."""
            shift = torch.zeros_like(texts).index_copy(1, channels, residual)  # (C, D)
            return support.logit_scale * (texts + shift), images + shift[labels], support.one_hot * entry_weight

        def logits(x: Tensor, weight: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return x @ weight.T + self.alpha * cache_logits(x, keys, values, self.beta)

        def loss_of(rows: Tensor) -> Tensor:
            return cross_entropy(logits(images[rows], *moved(residual, entry_weight)), labels[rows])

        optimizer = torch.optim.AdamW([residual, entry_weight], lr=self.lr, eps=1e-3, weight_decay=0.1)
        history = self._descend(loss_of, optimizer, support, run, every_epoch=self.epoch == "val")
        self.channels_, self.beta_, self.alpha_ = channels, self.beta, self.alpha
        self.weight_, self.keys_, self.values_ = moved(residual.detach(), entry_weight.detach())
        if support.val is not None:
            x, y = support.val
            if self.epoch == "val":
                candidates = (moved(*parameters) for parameters in zip(*history, strict=True))
                self.weight_, self.keys_, self.values_ = best_on(y, ((c, logits(x, *c)) for c in candidates))[0]
            self.beta_, self.alpha_ = best_cache(x @ self.weight_.T, x @ self.keys_.T, self.values_, y, (7.0, 7.0))
