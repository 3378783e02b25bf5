"""Bias audit: do groups of images get other errors and other labels, and how does that turn on the candidate labels?

After Agarwal et al., "Evaluating CLIP: Towards Characterization of Broader Capabilities and Downstream Implications"
(arXiv 2108.02818): the names that a user lets a model choose among, its class design, shift which groups are given
which labels. There is no official code, and only the abstract was available; the measures here are ours.

An image's group is its domain in the data set. Images are classified among several lists of candidate labels:

    classes            the data set's classes
    + S, - S           with the extra labels of the set S; or without its labels, where S names some of the classes
    all, all without S the classes with every set of extra labels, and that with one of several sets left out

For each list and group `audit` gives accuracy and error, and the share of images that get each label and each set of
labels. A disparity is the highest minus the lowest value among groups, and the highest over the lowest. Groups of few
images differ by chance: `by_chance` is what a difference stays below in 95 % of draws in which the images of each
class are reassigned to the groups. Groups may also differ in the images that they happen to have.

The audit measures disparities. Which labels are harmful, to whom, and what difference is too large is for its user to
say; that no disparity shows for some labels and images says nothing about others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.errors import DataError
from clipadapt.evaluation.protocol import Outcome, check, fit, judge
from clipadapt.methods import Method


def candidate_lists(classes: Sequence[str], sets: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The lists of candidate labels by name, as the module's docstring says; a list that occurs twice is kept once."""
    extra: dict[str, list[str]] = {}
    own: dict[str, list[str]] = {}
    for name, labels in sets.items():
        known = [label for label in labels if label in classes]
        if not labels or 0 < len(known) < len(labels):
            raise DataError(f"The set {name!r} must hold extra labels only or classes of the data set only.")
        if len(known) >= len(classes) - 1:
            raise DataError(f"Without the set {name!r} fewer than two classes are left.")
        (own if known else extra)[name] = list(labels)

    def added(without: str | None = None) -> list[str]:
        more = [label for name, labels in extra.items() if name != without for label in labels]
        return list(dict.fromkeys([*classes, *more]))

    lists = {"classes": list(classes)}
    lists |= {f"+ {name}": [*classes, *dict.fromkeys(labels)] for name, labels in extra.items()}
    lists |= {f"- {name}": [c for c in classes if c not in labels] for name, labels in own.items()}
    lists |= {"all": added()} | {f"all without {name}": added(name) for name in extra}
    found: dict[str, list[str]] = {}
    for name, labels in lists.items():
        if labels not in found.values():
            found[name] = labels
    return found


def disparity(by_group: Mapping[str, float]) -> dict[str, Any]:
    """The largest difference and ratio between two groups; the ratio is None if the lowest value is 0."""
    high, low = (choose(by_group, key=by_group.__getitem__) for choose in (max, min))
    top, bottom = by_group[high], by_group[low]
    return {"highest": high, "lowest": low, "difference": top - bottom, "ratio": top / bottom if bottom else None}


def audit(
    predicted: ArrayLike,
    labels: ArrayLike,
    groups: Sequence[str],
    candidates: Sequence[str],
    sets: Mapping[str, Sequence[str]] | None = None,
    *,
    draws: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """What each group gets, in JSON values; all shares in [0, 1].

    Args:
        predicted: (N,) indices into `candidates`.
        labels: (N,) indices of the true labels, -1 for an image whose label is not among the candidates: it counts
            for the rates, and not for the accuracy.
        groups: N names.
        sets: name -> labels whose share together is measure; those that are not candidates count as never given.
        draws: of groups by chance.

    Returns:
        pictures, accuracy, error: by group, accuracy and error None for a group without an image that could be right;
        rates: label -> group -> share, sets: the same; disparities: "accuracy", "error", "label NAME" and "set NAME"
        -> `disparity` with `by_chance`. Labels that are never given are left out.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if not len(predicted) or not len(predicted) == len(labels) == len(groups):
        raise DataError("An audit needs at least one image, and a label and a group for each.")
    names = list(dict.fromkeys(groups))
    place = np.array([names.index(group) for group in groups])  # (N,)
    given = {f"label {candidates[i]}": predicted == i for i in np.unique(predicted)}
    for name, members in (sets or {}).items():
        given[f"set {name}"] = np.isin(predicted, [i for i, label in enumerate(candidates) if label in members])
    can_be_right = labels >= 0
    rng = np.random.default_rng(seed)
    dealt = [_dealt(place, labels, rng) for _ in range(draws)]

    def shares(hits: np.ndarray, among: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(G,) the share of hits in each group; NaN in a group with none that count."""
        with np.errstate(invalid="ignore"):
            return np.bincount(place[among], hits[among], len(names)) / np.bincount(place[among], minlength=len(names))

    def measure(hits: np.ndarray, among: np.ndarray) -> tuple[dict[str, float | None], dict[str, Any] | None]:
        found = shares(hits, among, place)
        by_group = {name: None if np.isnan(v) else float(v) for name, v in zip(names, found, strict=True)}
        known = {name: value for name, value in by_group.items() if value is not None}
        if not known:
            return by_group, None
        chance = [np.ptp(found[~np.isnan(found)]) for found in (shares(hits, among, p) for p in dealt)]
        return by_group, disparity(known) | {"by_chance": float(np.quantile(chance, 0.95)) if chance else None}

    everyone = np.ones(len(predicted), dtype=bool)
    right = predicted == labels
    found: dict[str, Any] = {
        "pictures": {name: int((place == i).sum()) for i, name in enumerate(names)},
        "overall": {"accuracy": float(right[can_be_right].mean()) if can_be_right.any() else None},
        "rates": {},
        "sets": {},
        "disparities": {},
    }
    for what, hits in (("accuracy", right), ("error", ~right)):
        found[what], found["disparities"][what] = measure(hits, can_be_right)
    for what, hits in given.items():
        kind, name = what.split(" ", 1)
        by_group, found["disparities"][what] = measure(hits, everyone)
        found["rates" if kind == "label" else "sets"][name] = by_group
        found["overall"][what] = float(hits.mean())
    return found


def _dealt(place: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The groups (N,) reassigned among the images of each class."""
    dealt = place.copy()
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        dealt[members] = rng.permutation(place[members])
    return dealt


def run(
    method: Method,
    backbone: Backbone,
    split: Split,
    seed: int,
    *,
    shots: int = 16,
    sets: Mapping[str, Sequence[str]] | None = None,
) -> Outcome:
    """Figures "accuracy", "gap" (a disparity of accuracies) and, for each set, how often it is given; see the module.

    Args:
        shots: images of each class to learn from.
        sets: labels by the name of their set: extra candidates, or classes of the data set that are left out.
    """
    test, sets = split.test, sets or {}
    if test.domains is None:
        raise DataError(f"{test.name} has no domains, which an audit compares as groups.")
    lists = candidate_lists(test.class_names, sets)
    check(method, backbone, new_classes=True)
    support = None
    if method.card.signal != "none":
        support = split.train.few_shot(shots, seed=seed)
    plain = {} if support is not None else {"class_names": test.class_names}
    model, seconds = fit(method, backbone, support, **plain)
    among = _chooser(model, backbone)
    figures, classes, details = judge(model, test)
    found = {}
    for name, candidates in lists.items():
        chosen = model if name == "classes" else among(candidates)
        predicted = chosen.image_logits(test)[0][:, : len(candidates)].argmax(1).numpy()
        places = [candidates.index(c) if c in candidates else -1 for c in test.class_names]
        labels = np.array([places[label] for label in test.labels])
        found[name] = audit(predicted, labels, test.domains, candidates, sets, seed=seed)
    figures = {"accuracy": figures["accuracy"]} | _figures(lists, sets, found)
    more = {"candidates": lists, "audits": found, "shifts": _shifts(found)}
    return Outcome(figures, model, seconds, classes, details | more)


def _chooser(model: Method, backbone: Backbone) -> Callable[[list[str]], Method]:
    """Candidate labels -> the model that chooses among them; one that learns from names alone is fitted again."""
    if model.card.new_classes:
        return model.with_classes
    return lambda candidates: replace(model).fit(backbone, class_names=candidates)


def _figures(
    lists: Mapping[str, list[str]], sets: Mapping[str, Sequence[str]], found: Mapping[str, Any]
) -> dict[str, float]:
    """Difference and ratio (lowest over highest) of the groups' accuracies, and how often each set is given."""
    figures: dict[str, float] = {}
    for name, audited in found.items():
        where = "" if name == "classes" else f" ({name})"
        gap = audited["disparities"]["accuracy"]
        if gap is not None:
            figures |= {f"accuracy{where}": audited["overall"]["accuracy"], f"gap{where}": gap["difference"]}
        if name == "classes" and gap is not None:
            figures["gap by chance"] = gap["by_chance"]
            figures["lowest / highest"] = 1 / gap["ratio"] if gap["ratio"] else 0.0
        for label_set, labels in sets.items():
            if set(labels) & set(lists[name]):
                what = f"set {label_set}"
                figures[f"{label_set}{where}"] = audited["overall"][what]
                figures[f"gap of {label_set}{where}"] = audited["disparities"][what]["difference"]
    return figures


def _shifts(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """List of candidates -> what of the disparities (differences) grew or fell against the classes alone.

    A label or set that is never given with one of the two lists has the difference 0 there.
    """
    gaps = {
        name: {what: d["difference"] for what, d in audited["disparities"].items() if d is not None}
        for name, audited in found.items()
    }
    base = gaps["classes"]
    return {
        name: {what: own.get(what, 0.0) - base.get(what, 0.0) for what in {**base, **own}}
        for name, own in gaps.items()
        if name != "classes"
    }
