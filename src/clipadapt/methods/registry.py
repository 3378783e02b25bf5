"""Every method by its key. A file in a family folder that defines a class with `@register` is all it takes."""

from __future__ import annotations

import dataclasses
import pkgutil
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.methods.base import Method

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known under its card's key."""
    key = cls.card.key
    if key in _METHODS and _METHODS[key].__module__ != cls.__module__:
        raise ValueError(f"Two methods are called {key!r}: {_METHODS[key].__module__} and {cls.__module__}.")
    _METHODS[key] = cls
    return cls


@cache
def _discover() -> None:
    import clipadapt.methods as package

    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        import_module(module.name)


def list_methods(pattern: str = "*") -> list[str]:
    """Sorted keys of the methods that match a glob, such as "*adapter*"."""
    _discover()
    return sorted(key for key in _METHODS if fnmatchcase(key, pattern))


def method_class(key: str) -> type[Method]:
    """The class behind a key; an unknown key names the nearest known ones."""
    _discover()
    if key not in _METHODS:
        raise unknown_name("method", key, _METHODS)
    return _METHODS[key]


def create(key: str, **hyperparameters: Any) -> Any:
    """A method by its key, such as `create("tip-adapter", alpha=1.0)`; not fitted yet.

    The type depends on the key: every one is a `Method`, most are `FeatureMethod`s with `fit_features`.
    """
    cls = method_class(key)
    known = {f.name for f in dataclasses.fields(cls)}
    for name in hyperparameters:
        if name not in known:
            raise ClipadaptError(f"{key}: {unknown_name('hyper-parameter', name, known)}")
    return cls(**hyperparameters)
