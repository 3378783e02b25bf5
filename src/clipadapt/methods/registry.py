"""Every method by its key. A file in a family folder that defines a class with `@method` is all it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, TypeVar, dataclass_transform

from clipadapt.errors import ClipadaptError, unknown_name
from clipadapt.methods.card import Card, card_of, hyper, settings_of
from clipadapt.methods.catalogue import cards, module_of

M = TypeVar("M", bound=type)
_METHODS: dict[str, Any] = {}  # the classes that have been imported, by key


@dataclass_transform(kw_only_default=True, field_specifiers=(hyper,))
def method(key: str, **facts: Any) -> Callable[[M], M]:
    """Class decorator: a method called `key` with the facts of its `Card`; its `hyper` fields become keyword arguments.

    `family`, `task` and `kind` follow from the file and the bases; `signal` and `requires` are those of the kind
    unless they are given.
    """

    def decorate(cls: M) -> M:
        taken = module_of(key) or (_METHODS[key].__module__ if key in _METHODS else None)
        if taken not in (None, cls.__module__):
            raise ValueError(f"Two methods are called {key!r}: {taken} and {cls.__module__}.")
        family = facts.get("family", cls.__module__.rpartition(".")[0].rpartition(".")[2])
        names = [base.__name__ for base in cls.__mro__[1:]]
        cls.card = card_of(key, family, names, {k: v for k, v in facts.items() if k != "family"})  # type: ignore[attr-defined]
        if not cls.card.task and cls.card.kind != "pretraining":  # type: ignore[attr-defined]
            raise ValueError(f"{key} has no task: one of its bases must be named in TASKS of clipadapt.methods.card.")
        _METHODS[key] = dataclasses.dataclass(kw_only=True)(cls)
        return cls

    return decorate


def list_methods(pattern: str = "*") -> list[str]:
    """Sorted keys of the methods that match a glob, such as "*adapter*"."""
    return sorted(key for key in {*cards(), *_METHODS} if fnmatchcase(key, pattern))


def card(key: str) -> Card:
    """The card of a method, which is not imported for it; an unknown key names the nearest known ones."""
    if key in _METHODS:
        return _METHODS[key].card
    if key not in cards():
        if home := module_of(key):
            raise ClipadaptError(f"{home} has no class under @method({key!r}, ...), so there is no such method.")
        raise unknown_name("method", key, list_methods())
    return cards()[key]


def method_class(key: str) -> Any:
    """The class behind a key; an unknown key names the nearest known ones."""
    if key not in _METHODS:
        card(key)
        import_module(module_of(key) or "")
    return _METHODS[key]


def create(key: str, **hyperparameters: Any) -> Any:
    """A method by its key, such as `create("tip-adapter", alpha=1.0)`; not fitted yet.

    The type depends on the key: every one is a `Method`, most are `FeatureMethod`s with `fit_features`.
    """
    cls = method_class(key)
    known = settings_of(cls)
    for name in hyperparameters:
        if name not in known:
            raise ClipadaptError(f"{key}: {unknown_name('hyper-parameter', name, known)}")
    return cls(**{known[name].name: value for name, value in hyperparameters.items()})
