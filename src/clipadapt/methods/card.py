"""The facts of a method, and what its kind says where the method says nothing. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from clipadapt.errors import ClipadaptError


@dataclass(frozen=True)
class Card:
    """The facts of a method, shown by `clipadapt methods` and checked by the conformance suite.

    Attributes:
        key: what the method is called; its file has the same name.
        title: of the paper.
        arxiv: number of the paper on arXiv, or None.
        family: the folder that its file is in.
        task: what a fitted one answers: "classifier", "segmenter", "detector", "retriever", "text-generator" or
            "image-generator".
        kind: how it learns: "features", "prompts", "weights", "images", "wrapper", "test-time" or "pretraining".
        problem: what the paper sets out to do, in its own words.
        trains: what is trained; empty where nothing is.
        signal: what `fit` learns from: "none" (class names only), "labels" (a labelled support set), "unlabelled"
            (images without labels; labelled ones are welcome) or "pairs" (images with captions).
        requires: the capabilities without which a backbone is refused.
        new_classes: a fitted one can be used for classes that it has not learned (`with_classes`).
        multi_label: it also takes images that each show any number of classes, and then says of each class if it is
            present.
        unlabelled: it uses `fit(..., unlabelled=)`; where the signal is "labels", unlabelled images alone then do.
        streams: it learns task after task, `fit(..., task=)`, and keeps what it learned before.
    """

    key: str
    title: str
    arxiv: str | None = None
    family: str = ""
    task: str = ""
    kind: str = ""
    problem: str = "few-shot classification"
    trains: str = ""
    signal: str = "labels"
    requires: frozenset[str] = frozenset()
    new_classes: bool = False
    multi_label: bool = False
    unlabelled: bool = False
    streams: bool = False


# What the base classes of methods stand for. A card is made from the names of a class's bases and from its decorator,
# so that it can be read without importing the method.
TASKS = {
    "Classifier": "classifier",
    "Segmenter": "segmenter",
    "Detector": "detector",
    "Retriever": "retriever",
    "TextGenerator": "text-generator",
    "ImageGenerator": "image-generator",
}
KINDS: dict[str, dict[str, Any]] = {
    "FeatureMethod": {"kind": "features"},
    "CacheMethod": {"kind": "features"},
    "PromptMethod": {"kind": "prompts", "requires": frozenset({"texts", "prompts"})},
    "TowerPromptMethod": {"kind": "prompts", "requires": frozenset({"texts", "prompts", "gradients"})},
    "WeightMethod": {"kind": "weights", "requires": frozenset({"texts", "weights"})},
    "FineTuningMethod": {"kind": "weights", "requires": frozenset({"texts", "weights"})},
    "ImageMethod": {"kind": "images", "signal": "none", "requires": frozenset({"texts"})},
    "Wrapper": {"kind": "wrapper"},
    "TestTimeMethod": {"kind": "test-time", "signal": "none"},
    "Pretraining": {"kind": "pretraining", "signal": "pairs", "requires": frozenset({"texts", "weights"})},
}


def card_of(key: str, family: str, bases: Iterable[str], facts: dict[str, Any]) -> Card:
    """The card of a method from the names of all its base classes, nearest first, and the facts of its decorator.

    A fact that the decorator leaves out is that of the method's kind; of several kinds the first one counts, and
    their requirements are added up.
    """
    bases = list(bases)
    known = [KINDS[name] for name in bases if name in KINDS]
    default: dict[str, Any] = {"task": next((TASKS[name] for name in bases if name in TASKS), "")}
    for kind in reversed(known):
        default |= kind
    default["requires"] = frozenset().union(*(kind.get("requires", ()) for kind in known))
    facts = default | facts
    facts["requires"] = frozenset(facts["requires"])
    return Card(key=key, family=family.replace("_", "-"), **facts)


# -- hyper-parameters -------------------------------------------------------------------------------------------------


def hyper(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Any = None,
    check: Callable[[Any], str | None] | None = None,
    name: str | None = None,
) -> Any:
    """A hyper-parameter field: its default, what it is (unit, range, source), and the values it may take.

    Args:
        check: says of a value what it must be ("must be a list of words"), or None where it is that.
        name: what users call it, where the attribute is called otherwise because every method has one of that name.
    """
    meta = {"doc": doc, "low": low, "high": high, "choices": choices, "check": check, "name": name}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default, metadata=meta)
    return field(default=default, metadata=meta)


def settings_of(cls: Any) -> dict[str, Any]:
    """The hyper-parameter fields of a method's class by the names that users call them."""
    return {f.metadata.get("name") or f.name: f for f in dataclasses.fields(cls)}


def check_hyperparameter(where: str, value: Any, facts: Any) -> None:
    """Refuse a value that `facts`, the metadata of its `hyper` field, do not allow; `where` names it."""
    low, high, choices, check = map(facts.get, ("low", "high", "choices", "check"))
    if check is not None and (wanted := check(value)) is not None:
        raise ClipadaptError(f"{where} {wanted}.")
    if choices is not None and value not in choices:
        raise ClipadaptError(f"{where} is not one of {', '.join(map(repr, choices))}.")
    if (low is None and high is None) or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClipadaptError(f"{where} is not a number.")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ClipadaptError(f"{where} is out of range; it must be {bounds}.")
