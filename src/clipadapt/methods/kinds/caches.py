"""Feature methods that correct a linear classifier by a key-value cache of the support set, as Tip-Adapter does."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from clipadapt.methods.kinds.features import FeatureMethod
from clipadapt.nn.cache import cache_logits


class CacheMethod(FeatureMethod):
    """`_fit` leaves `weight_` (C, D), `keys_` (N, D), `values_` (N, C) and the factors `alpha_` and `beta_`."""

    linear: ClassVar[bool] = False

    weight_: Tensor
    keys_: Tensor
    values_: Tensor
    alpha_: float
    beta_: float

    def _logits(self, images: Tensor) -> Tensor:
        return images @ self.weight_.T + self.alpha_ * cache_logits(images, self.keys_, self.values_, self.beta_)
