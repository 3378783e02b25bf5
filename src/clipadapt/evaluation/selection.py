"""Which method suits these images? Cross-validation inside the support set; no other image is looked at.

Every registered method that fits the data and the backbone is tried with each setting of its `search_space`. All
settings of a method run over the folds side by side, and one that is clearly behind the leader on the same images
(paired, two standard errors) is dropped, so most of the time goes to those that matter. A method that would exceed
the budget is stopped as soon as its own progress reports show it, and named. Images that each show any number of
classes are judged by mean average precision in each fold, and no setting is dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset, MultiLabelDataset
from clipadapt.data.splits import stratified_folds
from clipadapt.errors import ClipadaptError
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods import Method, TrainingData, create, list_methods, method_class, why_not
from clipadapt.methods.registry import card
from clipadapt.metrics.classification import wilson
from clipadapt.training.loop import Report

# What is taken where one image of each class leaves none to hold out: it trains nothing, and its published setting is
# good at one shot.
UNJUDGED = "tip-adapter"


@dataclass(frozen=True)
class Trial:
    """A method with its best setting, judged on images of the support set that it had not seen.

    `accuracy` is in [0, 1] with its 95 % `interval`; both are None if one image of each class allows no judgement.
    Where images have several labels, it is the mean of the folds' average precisions, without an interval. `seconds` is
    the time of all its fits and predictions.
    """

    key: str
    hyperparameters: dict[str, Any]
    accuracy: float | None
    interval: tuple[float, float] | None
    seconds: float
    trained_parameters: int

    def create(self) -> Any:
        """The method with this setting, not fitted."""
        return create(self.key, **self.hyperparameters)


@dataclass(frozen=True)
class Selection:
    """What `select` found: zero-shot first, then each method that was judged; `skipped` names the others and why."""

    trials: list[Trial]
    best: Trial
    reason: str
    skipped: list[tuple[str, str]]


class OverBudget(Exception):
    """Raised out of a method's training when its own progress shows that it cannot end in time."""


def settings(cls: type[Method]) -> list[dict[str, Any]]:
    """Every combination of a method's `search_space`; one empty setting where there is nothing to search."""
    return [dict(zip(cls.search_space, values, strict=True)) for values in product(*cls.search_space.values())]


def contenders(hits: dict[int, np.ndarray]) -> list[int]:
    """Of settings with their hits (V,) on the same images, those not clearly behind the leader.

    A setting goes when its paired deficit exceeds two standard errors (McNemar: |losses - wins| > 2 sqrt(l + w)).
    """
    leader = hits[max(hits, key=lambda c: hits[c].sum())]
    deficits = {c: ((leader & ~h).sum(), (h & ~leader).sum()) for c, h in hits.items()}
    return [c for c, (losses, wins) in deficits.items() if losses - wins <= 2 * np.sqrt(losses + wins)]


def select(
    backbone: Backbone,
    support: Dataset | MultiLabelDataset,
    *,
    keys: Sequence[str] | None = None,
    budget: float = 60.0,
    folds: int = 5,
    seed: int = 1,
    templates: Any = "photo",
    frequencies: Sequence[float] | None = None,
    overrides: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    progress: Callable[[str], None] | None = None,
) -> Selection:
    """Judge methods on `support` within a budget, and choose the best.

    zero-shot is always judged. Each method may take a few times its equal share of the time; those that need more are
    tried again with what is left at the end. Ties go to the earlier one in the order of the table: what trains nothing
    comes first. With one image of each class none can be held out, and `UNJUDGED` is taken with its published setting.

    Args:
        support: labelled images; of several labels, methods that take them are judged by mean average precision.
        keys: the methods to try; all if None.
        budget: seconds for everything.
        folds: at most as many as the largest class has images.
        seed: of the folds.
        templates: of the class texts, for all methods.
        frequencies: (C,) how often each class occurs where the model will be used; accuracies are then those to expect
            there, while without it every image of the support set counts the same. For one label an image only.
        overrides: fixed hyper-parameters by method; the others take the values of its search space.
        progress: gets a line for each method that ends.
    """
    tell = progress or (lambda line: None)
    judge: _Judge | _SetJudge
    if isinstance(support, MultiLabelDataset):
        keys = [key for key in keys or list_methods() if card(key).multi_label]
        k, measure, best_is = min(folds, len(support)), "mAP ", "has the highest mAP"
    else:
        k, measure, best_is = min(folds, max(support.counts)), "", "is best"
        if k < 2:
            trials = [Trial(key, {"templates": templates}, None, None, 0.0, 0) for key in ("zero-shot", UNJUDGED)]
            reason = (
                f"with one image per class none is left for validation, so {UNJUDGED} runs with its published setting"
            )
            return Selection(trials, trials[-1], reason, [])

    end = time.perf_counter() + budget
    if isinstance(support, MultiLabelDataset):
        judge = _SetJudge(backbone, support, k, seed, templates, overrides)
    else:
        judge = _Judge(backbone, support, k, seed, templates, overrides, frequencies)
    found = {
        "zero-shot": judge("zero-shot", until=math.inf)
    }  # regardless of the budget: it is what the others must beat
    order = [key for key in order_of(keys) if key != "zero-shot"]
    refused: dict[str, str] = {}
    late: dict[str, str] = {}
    groups = [[key for key in order if sees_features(key) == features] for features in (True, False)]
    for group, generosity in product(groups, (3, 1)):  # what runs the towers gets what the others leave
        waiting = [key for key in group if key not in found and key not in refused]
        for number, key in enumerate(waiting):
            late.pop(key, None)
            now = time.perf_counter()
            share = (end - now) * min(1.0, generosity / (len(waiting) - number))
            try:
                found[key] = judge(key, until=now + share)
                tell(f"{key}: {measure}{100 * (found[key].accuracy or 0):.1f} % in {found[key].seconds:.1f} s")
            except OverBudget as error:
                late[key] = str(error)
            except (ClipadaptError, FloatingPointError) as error:  # this data or this backbone does not suit it
                refused[key] = str(error).removeprefix(f"{key}: ")
                tell(f"{key}: skipped, {refused[key]}")
    if late:
        tell(f"not tried, out of time: {', '.join(late)}")

    skipped = refused | late
    trials = [found[key] for key in ["zero-shot", *order] if key in found]
    best, zero_shot = max(trials, key=lambda t: t.accuracy or 0), trials[0]
    reason = f"{best.key} {best_is} on {len(support):,} images of the support set, each held out once in {k} folds"
    if best is zero_shot:
        reason = f"no method did better than zero-shot on {len(support):,} images of the support set"
    elif best.interval and zero_shot.interval and best.interval[0] <= zero_shot.interval[1]:
        reason += "; its lead over zero-shot may be chance, as there are few images"
    return Selection(trials, best, reason, [(key, skipped[key]) for key in order if key in skipped])


class _Judge:
    """Cross-validates one method after the other on the same folds of one support set, encoded once."""

    folds: Sequence[Any]

    def __init__(
        self,
        backbone: Backbone,
        support: Any,
        k: int,
        seed: int,
        templates: Any,
        overrides: Mapping[str, dict[str, Any]],
        frequencies: Sequence[float] | None = None,
    ) -> None:
        self.backbone, self.support, self.templates, self.overrides = backbone, support, templates, overrides
        self.features = encode_images(backbone, support).features.numpy()  # (N, D)
        self.texts = encode_classes(backbone, support.class_names, templates)  # (C, D)
        self.labels = np.array(support.labels)  # (N,)
        self.folds = [np.array(rows) for rows in stratified_folds(support.labels, k, seed)]
        judged = self.labels[np.concatenate(self.folds)]  # (N,) in the order in which they are judged
        counts = np.bincount(judged, minlength=len(support.class_names))
        self.weights = np.ones(len(judged)) if frequencies is None else (np.array(frequencies) / counts.clip(1))[judged]

    def __call__(self, key: str, until: float) -> Trial:
        """All settings of a method through the folds, side by side; the best one's trial.

        Raises `OverBudget` when not even one setting can be judged, and the winner refitted, before `until`.
        """
        cls = method_class(key)
        reason = why_not(cls.card, self.backbone, TrainingData(self.support, class_names=self.support.class_names))
        if reason is not None:
            raise ClipadaptError(reason)
        begun = time.perf_counter()
        if begun >= until:
            raise OverBudget("no time was left")
        tried = [s | self.overrides.get(key, {}) for s in settings(cls)]
        combos = [s for i, s in enumerate(tried) if s not in tried[:i]]
        hits = {c: np.zeros(0, dtype=bool) for c in range(len(combos))}
        parameters, longest = 0, 0.0
        for fold, held_out in enumerate(self.folds):
            fits_after = len(self.folds) - fold  # one setting through the other folds, and the winner on everything
            for c in hits:
                fit_begun = time.perf_counter()
                model = self._fit(key, combos[c], held_out, stop_when_late(fits_after, until))
                hits[c] = np.append(hits[c], self._evaluate(model, held_out))
                parameters = model.trained_parameters
                longest = max(longest, time.perf_counter() - fit_begun)
                if time.perf_counter() + longest * (fits_after + 1) > until:
                    reached = len(hits[c])
                    hits = {s: h for s, h in hits.items() if len(h) == reached}
                    break  # no time for the settings that were not reached
            hits = {c: hits[c] for c in self._contenders(hits)}
            if time.perf_counter() + longest * (len(hits) * (fits_after - 1) + 1) > until:
                leader = max(hits, key=lambda c: self.weights[: len(hits[c])] @ hits[c])
                hits = {leader: hits[leader]}
        best = max(hits, key=lambda c: self.weights[: len(hits[c])] @ hits[c])
        accuracy, interval = self._estimate(hits[best])
        setting = {"templates": self.templates} | combos[best]
        return Trial(key, setting, accuracy, interval, time.perf_counter() - begun, parameters)

    def _evaluate(self, model: Method, held_out: Any) -> np.ndarray:
        """What counts for a setting: hits (V,)."""
        return self._predict(model, held_out) == self.labels[held_out]

    def _contenders(self, hits: dict[int, np.ndarray]) -> list[int]:
        return contenders(hits)

    def _estimate(self, hits: np.ndarray) -> tuple[float, tuple[float, float] | None]:
        """Accuracy with its interval, from the hits (N,) on all folds."""
        w = self.weights
        total = w.sum() ** 2 / (w @ w)  # the effective sample size (Kish)
        correct = (w @ hits) * total / w.sum()
        return correct / total, wilson(correct, total)

    def _fit(self, key: str, setting: dict[str, Any], held_out: Any, watch: Report) -> Method:
        rows = np.setdiff1d(np.arange(len(self.labels)), held_out)
        method = create(key, **{"templates": self.templates} | setting)
        if sees_features(key):
            x, y = self.features[rows], self.labels[rows]
            return method.fit_features(x, y, self.texts, self.backbone.logit_scale, report=watch)
        return method.fit(self.backbone, self.support.select(rows), report=watch)

    def _predict(self, model: Method, rows: np.ndarray) -> np.ndarray:
        if sees_features(model.card.key):
            return np.asarray(model.logits(self.features[rows])).argmax(1)
        return model.predict(self.support.select(rows))


class _SetJudge(_Judge):
    """The same for images that each show any number of classes: a fold gives one figure, its mean average precision."""

    def __init__(
        self,
        backbone: Backbone,
        support: MultiLabelDataset,
        k: int,
        seed: int,
        templates: Any,
        overrides: Mapping[str, dict[str, Any]],
    ) -> None:
        self.backbone, self.support, self.templates, self.overrides = backbone, support, templates, overrides
        self.folds = support.folds(k, seed)  # (train, held out)
        self.weights = np.ones(k)

    def _fit(self, key: str, setting: dict[str, Any], held_out: Any, watch: Report) -> Method:
        return create(key, **{"templates": self.templates} | setting).fit(self.backbone, held_out[0], report=watch)

    def _evaluate(self, model: Method, held_out: Any) -> np.ndarray:
        """(1,) the fold's figure, or (0,) where none of its images has a label."""
        return np.array([model.score(held_out[1])] if held_out[1].targets.any() else [])

    def _contenders(self, hits: dict[int, np.ndarray]) -> list[int]:
        return list(hits)

    def _estimate(self, hits: np.ndarray) -> tuple[float, tuple[float, float] | None]:
        return float(np.mean(hits)) if len(hits) else 0.0, None


def stop_when_late(fits_after: int, until: float) -> Report:
    """A report that stops a training run when it and `fits_after` more like it would not end before `until`."""

    def watch(step: dict[str, Any]) -> None:
        if step["step"] >= 4 and step["step"] % 4 == 0:
            one = step["seconds"] * step["steps"] / step["step"]
            if time.perf_counter() - step["seconds"] + one * (1 + fits_after) > until:
                left = max(until - time.perf_counter(), 0)
                needed = duration(one * (1 + fits_after))
                raise OverBudget(f"it needs about {needed}, and {duration(left)} were left for it")

    return watch


def order_of(keys: Sequence[str] | None) -> list[str]:
    """zero-shot first, then what trains nothing, feature methods, and last what runs the towers.

    Without `keys`, all methods but those that need more than a labelled support set.
    """

    def cost(key: str) -> tuple[bool, bool, bool, str]:
        return key != "zero-shot", not sees_features(key), card(key).trains != "", key

    if keys is None:
        known = [card(key) for key in list_methods()]
        keys = [one.key for one in known if one.task == "classifier" and one.signal != "unlabelled"]
    return sorted({"zero-shot", *keys}, key=cost)


def sees_features(key: str) -> bool:
    """Whether a method needs only features, which are there already."""
    return card(key).kind == "features"


def duration(seconds: float) -> str:
    """Seconds as text, minutes from 100 s on."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
