"""A method's key and hyper-parameters as JSON values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def recipe(method: Any) -> dict[str, Any]:
    """The key and hyper-parameters of a method; a wrapped method nests, data sets and sources are named."""
    values = {name: _json(value) for name, value in method.settings.items()}
    return {"method": method.card.key, "hyperparameters": values}


def is_recipe(value: Any) -> bool:
    """Whether a JSON value is what `recipe` makes of a method."""
    return isinstance(value, dict) and value.keys() == {"method", "hyperparameters"}


def _json(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "card"):
        return recipe(value)
    return getattr(value, "name", None) or getattr(value, "__name__", type(value).__name__)
