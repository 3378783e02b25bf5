"""Base to new classes: learn half of the classes, be judged on each half alone (see `evaluation.base_to_new`)."""

from __future__ import annotations

from clipadapt.backbones import Backbone
from clipadapt.data import Split
from clipadapt.evaluation.base_to_new import base_to_new
from clipadapt.evaluation.protocol import NotApplicable, Outcome
from clipadapt.methods import Method


def run(method: Method, backbone: Backbone, split: Split, seed: int, *, shots: int = 16) -> Outcome:
    if not method.card.new_classes:
        raise NotApplicable(f"{method.card.key} ties what it learns to its classes.")
    missing = method.card.requires - backbone.capabilities
    if missing:
        raise NotApplicable(f"{method.card.key} needs a backbone with {', '.join(sorted(missing))}.")
    found = base_to_new(method, backbone, split.train, split.test, shots, seed)
    figures = {"base": found.base, "new": found.new, "harmonic": found.harmonic}
    return Outcome(figures, found.model, found.seconds)
