"""Classification of images: logits, probabilities, predictions, accuracy, and classes that come later."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipadapt.data import Dataset, MultiLabelDataset, class_texts
from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.features import encode_classes, encode_images
from clipadapt.features.encoder import Encoder
from clipadapt.methods.base import Method
from clipadapt.methods.recipe import recipe
from clipadapt.methods.tasks.labels import OneLabel, SeveralLabels, several, threshold_for
from clipadapt.methods.training_data import TrainingData
from clipadapt.renamed import old_attribute

Array = Tensor | np.ndarray


@dataclass(frozen=True)
class Head:
    """How a model's image features become logits.

    Attributes:
        logits: features (N, D), unit rows -> (N, C); gradients flow where the method allows it.
        weight: W (C, D) where logits are x W' + b, else None.
        bias: b (C,), or None where there is none.
    """

    logits: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None


class Classifier(Method):
    """Answers which class an image shows, or which classes.

    Write `_logits` unless the classifier is linear: then what learns leaves `weight_` (C, D) and perhaps `bias_` (C,).
    """

    task: ClassVar[str] = "classifier"
    linear: ClassVar[bool] = True  # false from the first class on that writes `_logits`
    multi_label_ = False  # of the class: for models saved before there were such methods
    threshold_: float | None = None
    bias_: Tensor | None = None

    weight_: Tensor
    class_names_: list[str]
    dim_: int

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.linear = cls.linear and "_logits" not in vars(cls)

    # -- learning ---------------------------------------------------------------------------------------------------

    def _open(self, model: Any, data: TrainingData) -> None:
        super()._open(model, data)
        names = data.class_names
        if names is None:
            raise ClipadaptError(f"{self.card.key}.fit needs a support set or class_names.")
        self._check_classes(names)
        self.class_names_, self.dim_ = names, model.dim
        self._start(several(data.support))

    def _start(self, multi_label: bool) -> None:
        """Remember of which kind the labels are; refuse sets of them where the method does not learn from such."""
        if multi_label and not self.card.multi_label:
            raise ClipadaptError(f"{self.card.key} learns from images of one class each, and these can show several.")
        self.multi_label_, self.threshold_ = multi_label, None

    def _close(self, data: TrainingData) -> None:
        if self.multi_label_:
            judged = data.support if data.val is None else data.val
            scores = self.image_logits(judged)[0] if len(judged) else None
            self.threshold_ = threshold_for(judged.targets, scores)

    @property
    def labels(self) -> OneLabel | SeveralLabels:
        """What labels are to this model: one class an image, or any number."""
        return SeveralLabels(self.threshold_, self.card.key) if self.multi_label_ else OneLabel()

    def _check_classes(self, names: Sequence[str]) -> None:
        if len(names) < 2:
            raise ClipadaptError(f"{self.card.key} needs at least two classes, not {list(names)}.")

    def with_classes(self, class_names: Sequence[str]) -> Self:
        """This fitted method for other classes, by their names alone; itself stays as it is. Nothing is refitted.

        Raises:
            ClipadaptError: what the method learned cannot be applied to new classes (see `Card.new_classes`).
        """
        if not self.card.new_classes:
            raise ClipadaptError(f"{self.card.key} cannot be applied to new classes; refit it.")
        model = self._model("it has no text tower for new classes")
        self._check_classes(class_names)
        other = copy.copy(self)
        other.class_names_ = list(class_names)
        other._reclassify(model)
        return other

    def _reclassify(self, model: Any) -> None:
        """After `class_names_` changed: rebuild what depends on them. By default, the classifier of the class texts."""
        self.weight_ = self._text_classifier(model)

    def _class_texts(self, model: Any) -> Tensor:
        """Unit text features (C, D) of the classes, on the CPU."""
        return encode_classes(model, self.class_names_, self.templates)

    def _text_classifier(self, model: Any) -> Tensor:
        return model.logit_scale * self._class_texts(model)  # (C, D)

    # -- predicting -------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """How this model sees an image, for embeddings and for `head`: the towers, adapted or not."""
        return self._model("it has no towers to encode with")

    @property
    def _scorer(self) -> Encoder:
        """What encodes images for `_logits`: `encoder`, unless the method takes more of an image than features."""
        return self.encoder

    @property
    def head(self) -> Head | None:
        """How features of `encoder` become logits; None where it takes more than these."""
        self._fitted("class_names_")
        return Head(self._logits, self.weight_, self.bias_) if self.linear else Head(self._logits)

    def _logits(self, images: Tensor) -> Tensor:
        """The method's classifier: (N, D) unit features -> (N, C). By default it is linear."""
        logits = images @ self.weight_.T
        return logits if self.bias_ is None else logits + self.bias_

    def logits(self, image_features: Array) -> Array:
        """(N, D) image features, unit or not -> (N, C) logits, of the type that was given (torch or numpy)."""
        features = unit(image_features, "image_features", dim=self._fitted("dim_"))
        if self.head is None:
            raise ClipadaptError(f"{self.card.key} looks at images, not at features: use image_logits or predict.")
        with torch.no_grad():
            out = self.head.logits(features)
        return out.numpy() if isinstance(image_features, np.ndarray) else out

    def image_logits(self, images: Any, *, on_error: str = "raise", progress: bool = False) -> tuple[Tensor, list[int]]:
        """Logits (M, C) of images (paths, PIL, a data set, or (N, 3, H, W) pixels) and which of them they are."""
        self._model("give logits() features, not images")
        encoder = self._scorer
        # Adapted towers exist once; keeping their features would only fill the disk.
        shared = self.origin_ is not None and encoder.fingerprint == self.origin_["fingerprint"]
        encoded = encode_images(encoder, images, cache=shared, on_error=on_error, progress=progress)
        with torch.no_grad():
            return self._logits(encoded.features), encoded.kept

    def predict_proba(self, images: Any) -> np.ndarray:
        """Class probabilities (N, C) of images; columns in the order of `class_names_`.

        Those of a multi-label model do not depend on one another: sigmoid(logit - `threshold_`), not calibrated.
        """
        return self.probabilities(self.image_logits(images)[0]).numpy()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (N, C) as `image_logits` gives them -> the probabilities of `predict_proba` (N, C)."""
        return self.labels.probabilities(logits)

    def predict(self, images: Any) -> np.ndarray:
        """Labels (N,) of images: ints into `class_names_`; a multi-label model gives (N, C) bool."""
        return self.labels.decided(self.image_logits(images)[0])

    def score(self, data: Dataset | MultiLabelDataset) -> float:
        """Top-1 accuracy in [0, 1] on labelled images; classes are matched by name.

        Of a multi-label model it is the mean average precision (mAP) over the classes that are present at all.
        """
        if len(data) == 0:
            raise ClipadaptError("score needs at least one labelled image.")
        place = self.places_of(data.class_names)
        return self.labels.score(self.image_logits(data)[0], data, place, self.card.key)

    def places_of(self, names: Sequence[str]) -> list[int]:
        """The columns of the logits that classes have, by their names; an unknown one is refused."""
        known = self._fitted("class_names_")
        if unknown := [name for name in names if name not in known]:
            raise unknown_name("class of this model", unknown[0], known)
        return [known.index(name) for name in names]

    # -- texts and embeddings ---------------------------------------------------------------------------------------

    @property
    def plain_texts(self) -> bool:
        """Whether free texts go through the text tower of `backbone_` alone, without learned prompts or modules."""
        return True

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """T texts -> (T, D) unit features, as this model's text side sees them, in the space of `encoder`."""
        return self._model("it has no text tower").encode_texts(texts)

    def encode_class(self, name: str) -> Tensor:
        """(D,) unit feature of a class as this model's texts name it: the mean of its sentences."""
        sentences = class_texts([name], self.templates)[0]
        return normalize(self.encode_texts(sentences).mean(0), dim=0)

    @property
    def adapts_texts(self) -> bool:
        """Whether it encodes texts differently from the backbone that it was adapted from."""
        model = self._fitted("backbone_")
        if model is None or self.origin_ is None:
            return False
        return not self.plain_texts or model.fingerprint != self.origin_["fingerprint"]

    image_tower = old_attribute("encoder", lambda model: lambda: model.encoder)
    encode_pixels = old_attribute("encoder.encode", lambda model: model.encoder.encode)
    image_fingerprint = old_attribute("encoder.image_fingerprint", lambda model: model.encoder.image_fingerprint)

    def _adapted_fingerprint(self, model: Any, learned: Mapping[str, Tensor]) -> str:
        """Of an image tower that `learned` tensors change without being weights of `model`."""
        digest = blake2b(json.dumps([model.image_fingerprint, recipe(self)], default=str).encode(), digest_size=16)
        for name in sorted(learned):
            digest.update(name.encode() + learned[name].detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def unit(features: Array, what: str, dim: int | None = None) -> Tensor:
    """Features as float32 unit rows (N, D); refuses what is not a finite matrix of the right width."""
    x = torch.as_tensor(features)
    if x.ndim != 2 or (dim is not None and x.shape[1] != dim):
        raise ClipadaptError(f"{what} must have shape (N, {dim or 'D'}), not {tuple(x.shape)}.")
    x = x.float()
    if not torch.isfinite(x).all():
        raise ClipadaptError(f"{what} hold values that are not finite.")
    return normalize(x, dim=1)
