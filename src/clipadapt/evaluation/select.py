"""Which method suits these pictures? Cross-validation inside the support set; no other picture is looked at.

Every registered method that fits the data and the backbone is tried with each setting of its `search_space`. All
settings of a method run over the folds side by side, and one that is clearly behind the leader on the same pictures
(paired, two standard errors) is dropped, so most of the time goes to those that matter. A method that would exceed
the budget is stopped as soon as its own progress reports show it, and named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.data.splits import stratified_folds
from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.metrics import wilson
from clipadapt.features import encode_classes, encode_images
from clipadapt.methods import FeatureMethod, Method, create, list_methods, method_class


@dataclass(frozen=True)
class Trial:
    """A method with its best setting, judged on pictures of the support set that it had not seen.

    `accuracy` is in [0, 1] with its 95 % `interval`; both are None where one picture a class allows no judgement.
    `seconds` is the time of all its fits and predictions.
    """

    key: str
    hyperparameters: dict[str, Any]
    accuracy: float | None
    interval: tuple[float, float] | None
    seconds: float
    trained_parameters: int

    def create(self) -> Method:
        """The method with this setting, not fitted."""
        return create(self.key, **self.hyperparameters)


@dataclass(frozen=True)
class Selection:
    """What `select` found: zero-shot first, then each method that was judged; `skipped` names the others and why."""

    trials: list[Trial]
    best: Trial
    reason: str
    skipped: list[tuple[str, str]]


class _OverBudget(Exception):
    """Raised out of a method's training when its own progress shows that it cannot end in time."""


def settings(cls: type[Method]) -> list[dict[str, Any]]:
    """Every combination of a method's `search_space`; one empty setting where there is nothing to search."""
    return [dict(zip(cls.search_space, values, strict=True)) for values in product(*cls.search_space.values())]


def contenders(hits: dict[int, np.ndarray]) -> list[int]:
    """Of settings with their hits (V,) on the same pictures, those not clearly behind the leader.

    A setting goes when its paired deficit exceeds two standard errors (McNemar: |losses - wins| > 2 sqrt(l + w)).
    """
    leader = hits[max(hits, key=lambda c: hits[c].sum())]
    deficits = {c: ((leader & ~h).sum(), (h & ~leader).sum()) for c, h in hits.items()}
    return [c for c, (losses, wins) in deficits.items() if losses - wins <= 2 * np.sqrt(losses + wins)]


def select(
    backbone: Backbone,
    support: Dataset,
    *,
    keys: list[str] | None = None,
    budget: float = 60.0,
    folds: int = 5,
    seed: int = 1,
    templates: Any = "photo",
    overrides: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    progress: Callable[[str], None] | None = None,
) -> Selection:
    """Judge methods (all, or those in `keys`) on `support` within `budget` seconds, and choose the best.

    `overrides` fixes hyper-parameters by method; the others take the values of their search space.

    Ties go to the earlier one in the order of the table: what trains nothing comes first. With one picture a class
    nothing can be held out, and Tip-Adapter with its published setting is taken unjudged.
    """
    tell = progress or (lambda line: None)
    start = time.perf_counter()
    features = encode_images(backbone, support).features.numpy()
    texts = encode_classes(backbone, support.class_names, templates)
    labels = np.array(support.labels)
    k = min(folds, max(support.counts))

    def fold_rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        everything = np.arange(len(labels))
        for held_out in stratified_folds(support.labels, k, seed):
            yield np.setdiff1d(everything, held_out), np.array(held_out)

    def fit(key: str, setting: dict[str, Any], rows: np.ndarray, watch: Callable[[dict[str, Any]], None]) -> Method:
        method = create(key, templates=templates, **setting)
        if isinstance(method, FeatureMethod):
            return method.fit_features(features[rows], labels[rows], texts, backbone.logit_scale, report=watch)
        return method.fit(backbone, support.select(rows), report=watch)

    def judge(key: str) -> Trial:
        begun = time.perf_counter()
        combos = list({repr(c): c for s in settings(method_class(key)) for c in [s | overrides.get(key, {})]}.values())
        hits = {c: np.zeros(0, dtype=bool) for c in range(len(combos))}
        parameters, longest = 0, 0.0
        for fold, (train, held_out) in enumerate(fold_rows()):
            for c in hits:
                # After this fit: one setting through the remaining folds, and the winner once on everything.
                watch = _watch(fits_after=k - fold, until=start + budget)
                fit_begun = time.perf_counter()
                model = fit(key, combos[c], train, watch)
                predicted = predict(model, held_out)
                longest = max(longest, time.perf_counter() - fit_begun)
                hits[c] = np.append(hits[c], predicted == labels[held_out])
                parameters = model.trained_parameters
                if c != max(hits) and out_of_time(longest * (k - fold + 1)):
                    hits = {c: h for c, h in hits.items() if len(h) == len(hits[c]) and len(h) > 0}
                    break  # the settings that were not reached are given up
            hits = {c: hits[c] for c in contenders(hits)}
            if out_of_time(longest * len(hits) * (k - fold)):
                leader = max(hits, key=lambda c: hits[c].sum())
                hits = {leader: hits[leader]}
        best = max(hits, key=lambda c: hits[c].sum())
        correct, total = int(hits[best].sum()), len(hits[best])
        setting = {"templates": templates} | combos[best]
        seconds = time.perf_counter() - begun
        return Trial(key, setting, correct / total, wilson(correct, total), seconds, parameters)

    def predict(model: Method, rows: np.ndarray) -> np.ndarray:
        if isinstance(model, FeatureMethod):
            return np.asarray(model.logits(features[rows])).argmax(1)
        return model.predict(support.select(rows))

    def out_of_time(seconds: float) -> bool:
        return time.perf_counter() - start + seconds > budget

    if k < 2:
        trials = [Trial(key, {"templates": templates}, None, None, 0.0, 0) for key in ("zero-shot", "tip-adapter")]
        reason = "one picture a class leaves none to judge by, so Tip-Adapter runs with its published setting"
        return Selection(trials, trials[-1], reason, [])

    trials, skipped = [], []
    for key in _order(keys):
        missing = method_class(key).card.requires - backbone.capabilities
        if missing:
            skipped.append((key, f"needs a backbone with {', '.join(sorted(missing))}"))
            continue
        try:
            if key != "zero-shot" and out_of_time(0):
                raise _OverBudget(f"no time was left of {_duration(budget)}")
            trials.append(judge(key))
        except (_OverBudget, ClipadaptError, FloatingPointError) as error:
            skipped.append((key, str(error)))
            tell(f"{key}: skipped, {error}")
        else:
            tell(f"{key}: {100 * (trials[-1].accuracy or 0):.1f} % in {trials[-1].seconds:.1f} s")
    best = max(trials, key=lambda t: t.accuracy or 0)
    reason = f"{best.key} is best on {len(labels):,} pictures of the support set, each held out once in {k} folds"
    zero_shot = trials[0]
    if best is zero_shot:
        reason = f"no method did better than zero-shot on {len(labels):,} pictures of the support set"
    elif best.interval and zero_shot.interval and best.interval[0] <= zero_shot.interval[1]:
        reason += "; its lead over zero-shot may be chance, so few pictures tell little"
    return Selection(trials, best, reason, skipped)


def _watch(fits_after: int, until: float) -> Callable[[dict[str, Any]], None]:
    """A report that stops a training run when it and `fits_after` more like it would not end before `until`."""

    def watch(step: dict[str, Any]) -> None:
        if step["step"] >= 4 and step["step"] % 4 == 0:
            one = step["seconds"] * step["steps"] / step["step"]
            if time.perf_counter() - step["seconds"] + one * (1 + fits_after) > until:
                left = max(until - time.perf_counter(), 0)
                needed = _duration(one * (1 + fits_after))
                raise _OverBudget(f"it needs about {needed} more, and {_duration(left)} of the budget were left")

    return watch


def _order(keys: list[str] | None) -> list[str]:
    """zero-shot first, then what trains nothing, feature methods, and last what runs the towers."""

    def cost(key: str) -> tuple[bool, bool, bool, str]:
        cls = method_class(key)
        return key != "zero-shot", not issubclass(cls, FeatureMethod), cls.card.trains != "nothing", key

    return sorted({"zero-shot", *(keys if keys is not None else list_methods())}, key=cost)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
