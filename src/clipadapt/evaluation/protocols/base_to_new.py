"""Base to new classes: learn half of the classes, be judged on each half alone, by their names.

The protocol of Zhou et al., "Conditional Prompt Learning for Vision-Language Models" (arXiv 2203.05557), as its code
carries it out. The classes, in the order of their labels, are split into base (the first ceil(C/2)) and new (the rest).
The support set is sampled from the training part over all classes, and its base classes are kept: sampled after the
others were taken out, it would be a different one. Base accuracy is that among the base classes alone, new accuracy
that among the new classes alone, on the test part.

Over several data sets, each first averaged over its seeds, two summaries are published under one name, H: mostly the
harmonic mean of the averages (CoOp's 71.66), sometimes the average of the harmonic means (GDA's 78.72, where the
other is 78.97; arXiv 2402.04087). `harmonic_of_averages` and `average_of_harmonics` are the two.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset, Split
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.evaluation.choosing import SEED, with_chosen
from clipadapt.evaluation.protocol import Outcome, check
from clipadapt.methods import Method, create
from clipadapt.methods.base import Report
from clipadapt.metrics.classification import accuracy


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    shots: int = 16,
    choose: Mapping[str, Sequence[Any]] | None = None,
    tell_new: bool = False,
) -> Outcome:
    """Figures "base", "new" and "harmonic" of a method that can be used for new classes.

    Args:
        shots: images of each base class to learn from.
        choose: hyper-parameters to choose by the accuracy on the base classes' other training images (`with_chosen`).
        tell_new: methods that can use the names of the new classes while they learn (a hyper-parameter `new_classes`)
            get them.
    """
    check(method, backbone, new_classes=True)
    details = {}
    if choose:
        pool, support = split.train.base_new_split()[0], base_support(split.train, shots, SEED)
        method, details["chosen"] = with_chosen(method, backbone, pool, support, choose)
    if tell_new and "new_classes" in method.hyperparameters():
        told: dict[str, Any] = {"new_classes": split.test.base_new_split()[1].class_names}
        method = replace(method, **told)
    found = base_to_new(method, backbone, split.train, split.test, shots, seed)
    figures = {"base": found.base, "new": found.new, "harmonic": found.harmonic}
    return Outcome(figures, found.model, found.seconds, details=details)


@dataclass(frozen=True)
class BaseToNew:
    """What `base_to_new` found.

    Attributes:
        base: accuracy in [0, 1] on the test images of the base classes, among these classes.
        new: the same of the new classes.
        model: the method, fitted on the base classes.
        support: the images it learned from.
        seconds: how long it learned.
    """

    base: float
    new: float
    model: Method
    support: Dataset
    seconds: float

    @property
    def harmonic(self) -> float:
        """The harmonic mean of the two, called H."""
        return harmonic(self.base, self.new)


def harmonic(base: float, new: float) -> float:
    """Harmonic mean of two accuracies, shares or percents alike; 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def harmonic_of_averages(results: Sequence[tuple[float, float]]) -> float:
    """Harmonic mean of the average base and the average new accuracy over data sets; `results` are (base, new)."""
    return harmonic(fmean(base for base, _ in results), fmean(new for _, new in results))


def average_of_harmonics(results: Sequence[tuple[float, float]]) -> float:
    """Average over data sets of each one's own harmonic mean; `results` are (base, new)."""
    return fmean(harmonic(base, new) for base, new in results)


def base_support(train: Dataset, shots: int, seed: int) -> Dataset:
    """`shots` images of each base class, by the published order: sampled over all classes, then the base ones."""
    return train.few_shot(shots, seed=seed).base_new_split()[0]


def base_to_new(
    method: Method | str,
    backbone: Backbone,
    train: Dataset,
    test: Dataset,
    shots: int,
    seed: int = 1,
    *,
    report: Report | None = None,
) -> BaseToNew:
    """Fit a method on the base classes of `train`; judge it on the base and on the new classes of `test`.

    Args:
        method: a method, whose settings are used and which stays unfitted; or its key, for the default settings.
        train: the images that `shots` of each class are sampled from.
        test: the images to judge by, of the same classes in the same order.
        shots: images of each class.
        seed: of the sample. What the method draws depends on its own `seed`.
        report: called after every training step, as in `Method.fit`.

    Raises:
        ClipadaptError: the method ties what it learns to its classes.
        DataError: the two parts have different classes, fewer than two of them are new, or nothing is there to test.
    """
    method = create(method) if isinstance(method, str) else replace(method)
    if not method.card.new_classes:
        raise ClipadaptError(f"{method.card.key} cannot be applied to new classes, so it has no accuracy on them.")
    if train.class_names != test.class_names:
        raise DataError(f"{train.name} and {test.name} must have the same classes in the same order.")
    if len(train.class_names) < 4:
        raise DataError(f"{train.name}: base-to-new needs at least 4 classes, not {len(train.class_names)}.")
    base_test, new_test = test.base_new_split()
    for part, data in (("base", base_test), ("new", new_test)):
        if not len(data):
            raise DataError(f"{test.name} has no image of the {part} classes.")
    support = base_support(train, shots, seed)
    start = time.perf_counter()
    model = method.fit(backbone, support, report=report)
    seconds = time.perf_counter() - start
    # A method that was told of new names while it learned knows them too, behind those of the support set.
    among_base = model.image_logits(base_test)[0][:, : len(support.class_names)]
    return BaseToNew(
        base=accuracy(base_test.labels, among_base.argmax(dim=1)),
        new=accuracy(new_test.labels, model.with_classes(new_test.class_names).predict(new_test)),
        model=model,
        support=support,
        seconds=seconds,
    )
