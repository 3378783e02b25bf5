"""Hyper-parameters chosen on a part of the training images that is put aside; no test image is ever looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import product
from typing import Any

from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.evaluation.protocol import fit
from clipadapt.methods import Method, create
from clipadapt.methods.recipe import recipe
from clipadapt.metrics.classification import accuracy

SEED = 0  # of the support set that choices are made with, and of the method: the same choice for every seed of a suite
_KNOWN: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}  # choices made by this process


def check_grid(grid: Any) -> None:
    """Raise DataError unless `grid` is what `with_chosen` takes."""
    if not isinstance(grid, Mapping) or not all(isinstance(v, list | tuple) and v for v in grid.values()):
        raise DataError(f"choose is {{name of a hyper-parameter: [values]}}, such as {{lr: [x1, x10]}}, not {grid!r}.")
    for value in (v for values in grid.values() for v in values if isinstance(v, str) and v[:1] == "x"):
        try:
            float(value[1:])
        except ValueError:
            raise DataError(f"choose: {value!r} is not a multiple such as x10.") from None


def with_chosen(
    method: Method, backbone: Backbone, pool: Dataset, support: Dataset, grid: Mapping[str, Sequence[Any]]
) -> tuple[Method, dict[str, float]]:
    """The method with the values that do best on the images of `pool` that are not in `support`; what each one did.

    Args:
        method: an unfitted method.
        pool: training images of the classes that are learned.
        support: images of `pool` to learn from.
        grid: by hyper-parameter, the values to try in every combination; "x10" is ten times the method's own. Where a
            method lacks a hyper-parameter, that of the method that it wraps is meant; if that lacks it too, nothing is.

    Returns:
        The method, unfitted, and the accuracy in [0, 1] of each combination, by its values in JSON; 0 if its training
        diverged. Ties go to the earliest.

    Raises:
        DataError: the pool has no other images, or the grid is not as described.
    """
    check_grid(grid)
    tried = {name: _values(method, name, values) for name, values in grid.items()}
    tried = {name: values for name, values in tried.items() if values}
    if not tried:
        return method, {}
    taken = {id(item) for item in support.items}
    held_out = pool.select(i for i, item in enumerate(pool.items) if id(item) not in taken)
    if not len(held_out):
        raise DataError(f"To choose {', '.join(tried)}, {pool.name} needs training images beyond those learned from.")
    trial = _set(method, "seed", SEED)
    facts = [recipe(trial), tried, backbone.fingerprint, support.paths, held_out.paths, held_out.labels]
    key = blake2b(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    if key not in _KNOWN:
        scores: dict[str, float] = {}
        combinations = [dict(zip(tried, values, strict=True)) for values in product(*tried.values())]
        for values in combinations:
            candidate = trial
            for name, value in values.items():
                candidate = _set(candidate, name, value)
            try:
                model, _ = fit(candidate, backbone, support)
                score = accuracy(held_out.labels, model.predict(held_out))
            except FloatingPointError:
                score = 0.0
            scores[json.dumps(values)] = score
        _KNOWN[key] = max(combinations, key=lambda values: scores[json.dumps(values)]), scores
    best, scores = _KNOWN[key]
    for name, value in best.items():
        method = _set(method, name, value)
    return method, scores


def _set(method: Method, name: str, value: Any) -> Method:
    """The method with a hyper-parameter, its own or of the method that it wraps; unchanged if neither has it."""
    names, inner = method.hyperparameters(), getattr(method, "method", None)
    if name in names:
        return create(method.card.key, **{**method.settings, name: value})
    if "method" in names and isinstance(inner, Method):
        wrapped: dict[str, Any] = {"method": _set(inner, name, value)}
        return replace(method, **wrapped)
    return method


def _values(method: Method, name: str, values: Sequence[Any]) -> list[Any]:
    """The values to try, multiples worked out; none if the method and what it wraps lack the hyper-parameter."""
    inner = getattr(method, "method", None)
    if name not in method.hyperparameters():
        return _values(inner, name, values) if isinstance(inner, Method) else []
    own = method.settings[name]
    found = []
    for value in values:
        if isinstance(value, str) and value[:1] == "x":
            if not isinstance(own, int | float):
                return []  # nothing to take a multiple of
            value = float(f"{own * float(value[1:]):.3g}")
        try:
            replace(method, **{name: value})
        except ClipadaptError as error:
            raise DataError(f"choose: {error}") from None
        found.append(value)
    return found
