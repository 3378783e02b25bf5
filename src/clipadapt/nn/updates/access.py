"""Parts of a model by name, and weights that are read through a function for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from clipadapt.errors import ClipadaptError


def site_of(model: nn.Module, name: str) -> Any:
    """The sub-module of that name; ClipadaptError where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ClipadaptError(f"The model has no module called {name!r} to put an adapter behind.") from error


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The model's own parameter of that name, whatever is attached; ClipadaptError where there is none."""
    path, _, leaf = name.rpartition(".")
    try:
        weight = model.get_submodule(path)._parameters.get(leaf)
    except AttributeError:
        weight = None
    if weight is None:
        raise ClipadaptError(f"The model has no weight called {name!r}.")
    return weight


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def computed_weights(model: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While it lasts, each named weight of `model` reads as its function of the weight, computed at each reading.

    That holds for every code that reads the attribute, not for `forward` only, and for every module that shares the
    weight. Functions of nested contexts are applied in the order in which the contexts were entered. What the model
    holds (`parameters()`, `state_dict()`) stays as it is.
    """
    own: dict[str, nn.Parameter] = {}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}  # of a weight, by its id
    for path, module in model.named_modules():
        for leaf, weight in module._parameters.items():
            if weight is not None:
                own[f"{path}.{leaf}" if path else leaf] = weight
                holders.setdefault(id(weight), []).append((module, leaf))
    reads = [
        (*place, function)
        for name, function in functions.items()
        for place in holders[id(own[name] if name in own else weight_of(model, name))]
    ]
    modules = dict.fromkeys(module for module, _, _ in reads)
    for module, leaf, function in reads:
        module.__dict__.setdefault("_read_through", {}).setdefault(leaf, []).append(function)
    for module in modules:
        _set_class(module)
    try:
        yield
    finally:
        for module, leaf, function in reads:
            through = module.__dict__["_read_through"]
            through[leaf].remove(function)
            if not through[leaf]:
                del through[leaf]
        for module in modules:
            _set_class(module)


def _set_class(module: nn.Module) -> None:
    """Give a module the class in which exactly the leaves that have functions are computed."""
    plain: Any = getattr(type(module), "_plain_class", type(module))
    leaves = frozenset(module.__dict__["_read_through"])
    if not leaves:
        del module.__dict__["_read_through"]
    module.__class__ = _computing(plain, leaves) if leaves else plain


@cache
def _computing(plain: type[nn.Module], leaves: frozenset[str]) -> type[nn.Module]:
    """A subclass of `plain` whose parameters `leaves` go through the module's functions; a property precedes them."""

    def computed(leaf: str) -> property:
        def read(module: nn.Module) -> Any:
            weight: Any = module._parameters[leaf]
            for function in module.__dict__["_read_through"][leaf]:
                weight = function(weight)
            return weight

        return property(read)

    body = {"_plain_class": plain, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (plain,), {**body, **{leaf: computed(leaf) for leaf in leaves}})
