"""Features that somebody published, without the model that made them: a backbone that only looks up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.data.items import FeatureItem, Item
from clipadapt.errors import ClipadaptError, unknown_name


class PublishedFeatures:
    """What a feature method asks of a backbone, from one feature for each class.

    Its images are `FeatureItem`s. It has no tower, tokenizer or pixels, so its `capabilities` are empty and methods
    that need one of these refuse it by name.

    source          what the features are called in results
    class_features  class name -> (D,) text feature, of any length
    logit_scale     the factor on cosines that belongs to the encoder
    """

    capabilities: frozenset[str] = frozenset()
    aligned = True
    device = torch.device("cpu")

    def __init__(self, source: str, class_features: Mapping[str, Any], logit_scale: float = 100.0) -> None:
        if not class_features:
            raise ClipadaptError(f"{source} has no class features.")
        self.source, self.logit_scale = source, logit_scale
        self._features = {
            name: normalize(torch.as_tensor(feature).float(), dim=0) for name, feature in class_features.items()
        }
        self.dim = len(next(iter(self._features.values())))
        digest = blake2b(str(logit_scale).encode(), digest_size=16)
        for name, feature in sorted(self._features.items()):
            digest.update(name.encode() + feature.numpy().tobytes())
        self.fingerprint = self.image_fingerprint = digest.hexdigest()

    def encode_classes(self, class_names: Sequence[str]) -> Tensor:
        """Unit text features (C, D) of the names; ClipadaptError for a name that was not published."""
        for name in class_names:
            if name not in self._features:
                raise unknown_name(f"class of {self.source}", name, list(self._features))
        return torch.stack([self._features[name] for name in class_names])

    def prepare(self, item: Item) -> Tensor:
        """A `FeatureItem` -> its feature (D,)."""
        return item.feature if isinstance(item, FeatureItem) else self._absent()

    def encode(self, batch: Tensor) -> Tensor:
        """Features (B, D) as they are."""
        return batch

    def _absent(self, *args: Any, **kwargs: Any) -> Any:
        raise ClipadaptError(f"{self.source} is published features: there is no model to encode anything else with.")

    encode_images = encode_texts = encode_tokens = preprocess = _absent
