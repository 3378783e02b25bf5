"""All that one `fit` may see, checked once; and the one answer to "may this method run here?"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from clipadapt.data import Dataset, MultiLabelDataset, Pairs, as_items
from clipadapt.errors import ClipadaptError
from clipadapt.methods.card import Card


@dataclass(frozen=True)
class TrainingData:
    """What one `fit` may see.

    Attributes:
        support: labelled examples to learn from; an empty set where only names are given.
        val: labelled examples for choosing hyper-parameters, never trained on.
        unlabelled: images without labels.
        class_names: the classes; those of the support set unless they are given.
        task: the name of this step of a stream; None outside of streams.
        extras: further inputs by name, such as generated images or the features that `fit_features(..., negatives=)`
            takes.
    """

    support: Any = None
    val: Any = None
    unlabelled: Any = None
    class_names: list[str] | None = None
    task: str | None = None
    extras: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(
        cls, support: Any, val: Any, unlabelled: Any, class_names: Sequence[str] | None, task: str | None
    ) -> TrainingData:
        """From the arguments of `Method.fit`, in the forms that it takes."""
        if class_names is None:
            class_names = getattr(support, "class_names", None)
        elif support is None:
            support = Dataset(items=[], labels=[], class_names=list(class_names))
        elif list(class_names) != list(support.class_names):
            raise ClipadaptError("class_names differ from those of the support set, whose labels point at its own.")
        names = None if class_names is None else list(class_names)
        return cls(support, val, unlabelled, names, task)

    def with_more(self, more: Dataset) -> TrainingData:
        """The same with the labelled images of `more`, whose class names are those of the support set, added to it."""
        items, labels = [*self.support.items, *more.items], [*self.support.labels, *more.labels]
        return replace(self, support=replace(self.support, items=items, labels=labels, domains=None))

    def after(self, known: Sequence[str]) -> TrainingData:
        """The same as a later step of a stream: the classes `known` before come first, and labels count from there."""
        names = [*known, *(name for name in self.class_names or () if name not in known)]

        def renumbered(data: Any) -> Any:
            if data is None:
                return None
            labels = [names.index(data.class_names[label]) for label in data.labels]
            return replace(data, labels=labels, class_names=names)

        return replace(self, support=renumbered(self.support), val=renumbered(self.val), class_names=names)

    @property
    def labelled(self) -> int:
        """The number of labelled examples to learn from."""
        return 0 if self.support is None else len(self.support)

    @property
    def contents(self) -> list[str]:
        """A digest of every image to learn from."""
        more = [value for value in self.extras.values() if isinstance(value, Dataset)]
        support = self.support.items if isinstance(self.support, Pairs) else self.support
        given = [images for images in (support, self.unlabelled, *more) if images is not None]
        return [item.digest() for images in given for item in as_items(images)]

    @property
    def targets(self) -> Any:
        """What the support set says of its items: labels or captions; None without a support set."""
        return getattr(self.support, "captions" if isinstance(self.support, Pairs) else "labels", None)


def why_not(
    card: Card,
    model: Any = None,
    data: TrainingData | None = None,
    *,
    new_classes: bool = False,
    from_labels: bool = False,
) -> str | None:
    """Why the method cannot run here, as one sentence; None where it can.

    Args:
        card: of the method.
        model: the backbone that it would be fitted on, or None if that is not in question.
        data: what it would learn from, or None if that is not in question.
        new_classes: whether it must serve classes that it has not learned.
        from_labels: whether it must learn from labels.
    """
    key = card.key
    if model is not None and (missing := card.requires - model.capabilities):
        has = ", ".join(sorted(model.capabilities)) or "none of the optional capabilities"
        return f"{key} needs a backbone with {', '.join(sorted(missing))}; {model.source} has {has}."
    if new_classes and not (card.new_classes or card.signal == "none"):
        return f"{key} cannot be applied to new classes."
    if from_labels and card.signal != "labels":
        return f"{key} does not learn from labels."
    return None if data is None else _why_not_data(card, data)


def _why_not_data(card: Card, data: TrainingData) -> str | None:
    key, unlabelled = card.key, 0 if data.unlabelled is None else len(data.unlabelled)
    if isinstance(data.support, MultiLabelDataset) and not card.multi_label:
        return f"{key} learns from images of one class each, and these can show several."
    if data.val is not None and isinstance(data.val, MultiLabelDataset) != isinstance(data.support, MultiLabelDataset):
        return f"{key}: val must have labels of the same kind as the support set."
    if data.task is not None and not card.streams:
        return f"{key} does not learn task after task; leave task away."
    if unlabelled and not card.unlabelled:
        return f"{key} does not use unlabelled images."
    if card.signal == "unlabelled" and not unlabelled:
        return f"{key} learns from unlabelled images: give fit(..., unlabelled=)."
    pairs = isinstance(data.support, Pairs) and data.labelled and not isinstance(data.support.items[0], str)
    if card.signal == "pairs" and not pairs:
        return f"{key} learns from images with captions: give fit(backbone, pairs)."
    if card.signal == "labels" and not (data.labelled or unlabelled):
        return f"{key} learns from labelled images, and the support set has none."
    return None
