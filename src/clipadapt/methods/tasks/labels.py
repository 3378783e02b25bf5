"""The labels of images: one class each, or any number of them. All that differs between the two is here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipadapt.data import Dataset, MultiLabelDataset
from clipadapt.errors import ClipadaptError
from clipadapt.metrics.multilabel import best_threshold, mean_average_precision


class OneLabel:
    """Each image shows one class: the highest logit wins."""

    def array(self, data: Any) -> np.ndarray:
        """(N,) int64 labels of a data set."""
        return np.array(data.labels, dtype=np.int64)

    def checked(self, labels: Any, n: int, classes: int) -> Tensor:
        """Labels as int64 (n,), each in [0, classes)."""
        y = torch.as_tensor(np.asarray(labels))
        if y.shape != (n,):
            raise ClipadaptError(f"labels must have shape ({n},), one for each image, not {tuple(y.shape)}.")
        if n and (y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= classes):
            raise ClipadaptError(f"labels must be ints from 0 to {classes - 1}, one for each text feature.")
        return y.long()

    def probabilities(self, logits: Tensor) -> Tensor:
        """(N, C) -> (N, C), rows sum to 1."""
        return logits.softmax(dim=1)

    def decided(self, logits: Tensor) -> np.ndarray:
        """(N, C) -> (N,) ints."""
        return logits.argmax(dim=1).numpy()

    def score(self, logits: Tensor, data: Any, place: list[int], key: str) -> float:
        """Top-1 accuracy; `place` maps the data's classes to the columns of the logits (N, C)."""
        if isinstance(data, MultiLabelDataset):
            raise ClipadaptError(f"This {key} gives each image one class, and these can show several.")
        labels = np.array([place[label] for label in data.labels])
        return float((self.decided(logits) == labels).mean())


class SeveralLabels:
    """An image shows any number of classes: each is present whose logit is at least the threshold."""

    def __init__(self, threshold: float | None, key: str) -> None:
        self._threshold, self._key = threshold, key

    @property
    def threshold(self) -> float:
        if self._threshold is None:
            raise ClipadaptError(
                f"This {self._key} had no image to choose a threshold on: fit it with a support or val set, or set "
                "threshold_ to the score at or above which a class counts as present."
            )
        return self._threshold

    def array(self, data: Any) -> np.ndarray:
        """(N, C) bool of a data set."""
        return data.targets

    def checked(self, labels: Any, n: int, classes: int) -> Tensor:
        """Labels as bool (n, classes)."""
        y = torch.as_tensor(np.asarray(labels))
        if y.shape != (n, classes) or ((y != 0) & (y != 1)).any():
            raise ClipadaptError(f"labels must be true or false with shape ({n}, {classes}), not {tuple(y.shape)}.")
        return y.bool()

    def probabilities(self, logits: Tensor) -> Tensor:
        """(N, C) -> (N, C): sigmoid(logit - threshold), not calibrated; columns do not depend on one another."""
        return (logits - self.threshold).sigmoid()

    def decided(self, logits: Tensor) -> np.ndarray:
        """(N, C) -> (N, C) bool."""
        return (logits >= self.threshold).numpy()

    def score(self, logits: Tensor, data: Any, place: list[int], key: str) -> float:
        """Mean average precision over the classes that are present at all; one label an image is a set of one."""
        targets = np.zeros(logits.shape, dtype=bool)
        for row, label in zip(targets, data.labels, strict=True):
            row[[place[c] for c in data.classes_of(label)]] = True
        if not targets.any():
            raise ClipadaptError("score needs at least one image that shows a class.")
        return mean_average_precision(targets, logits)


def several(data: Any) -> bool:
    """Whether the images of a data set can show several classes each; labels (N, C) count as such."""
    return isinstance(data, MultiLabelDataset) or (not isinstance(data, Dataset) and np.ndim(data) == 2)


def threshold_for(targets: Any, scores: Tensor | None) -> float | None:
    """The threshold with the highest overall F1 on targets (N, C); None where no class is present or nothing scored."""
    return None if scores is None or not np.any(targets) else best_threshold(targets, scores)
