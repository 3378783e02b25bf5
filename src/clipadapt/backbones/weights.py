"""Modules whose weights share memory with another module's, some replaced, some made at each use.

A weight is computed when it is read in two cases: it is `Lazy`, which lasts and belongs to the module, or it is read
through functions for a while (`read_through`), which leaves what the module holds as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from clipadapt.errors import BackboneError

Weight = Tensor | Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Lazy:
    """A weight that is made at each use: `functions` applied to `original`, one after the other."""

    original: Tensor
    functions: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self) -> Tensor:
        value = self.original
        for function in self.functions:
            value = function(value)
        return value


class _Computing(nn.Module):
    """Mixed into the class of a module of which some weights are computed when they are read.

    Those in its `lazy` look like any other weight to who reads `state_dict`, or loads one, but are not among
    `parameters()`. Those in its `through` go through functions for a while, and only reading shows it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _lazy(self) and isinstance(value, Tensor):
            _put(self, name, value)
        else:
            super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, lazy in _lazy(self).items():
            destination[prefix + name] = lazy() if keep_vars else lazy().detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = {name: lazy for name, lazy in _lazy(self).items() if prefix + name in state_dict}
        for name, lazy in given.items():
            _put(self, name, lazy().detach().clone())
        if given:
            return self._load_from_state_dict(state_dict, prefix, *rest)  # of the class that it has now
        return super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for lazy in _lazy(self).values():
            lazy.original = fn(lazy.original)
            for function in lazy.functions:
                if isinstance(function, nn.Module):
                    function._apply(fn)
        return self


def _lazy(module: nn.Module) -> dict[str, Lazy]:
    """The weights that a module makes at each use, by their names in it."""
    return module.__dict__.get("lazy", {})


@cache
def _computing(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """`base` under its own name, with weights `names` that are computed when they are read."""
    made = {name: property(partial(_read, name)) for name in names}  # which precede `__getattr__`
    facts = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_plain_class": base}
    return type(base.__name__, (_Computing, base), made | facts)


def _read(name: str, module: nn.Module) -> Any:
    """What a weight reads as: what the module holds, then through the functions of `read_through`."""
    held = _held(module, name)
    value = held() if isinstance(held, Lazy) else held
    for function in module.__dict__.get("through", {}).get(name, ()):
        value = function(value)
    return value


def _held(module: nn.Module, key: str) -> Any:
    """What a module holds under the name of a weight: a tensor, a `Lazy`, or None."""
    lazy = _lazy(module).get(key)
    if lazy is not None:
        return lazy
    own: Any = module._parameters if key in module._parameters else module._buffers
    return own.get(key)


def _set(module: nn.Module, kept: str, weights: Mapping[str, Any]) -> None:
    """Let these be the weights in a module's `lazy` or `through`, and compute exactly what is in either."""
    if weights:
        module.__dict__[kept] = weights
    else:
        module.__dict__.pop(kept, None)
    base: Any = getattr(type(module), "_plain_class", type(module))
    names = {*_lazy(module), *module.__dict__.get("through", {})}
    module.__class__ = _computing(base, tuple(sorted(names))) if names else base


@contextmanager
def read_through(module: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While it lasts, each named weight below a module reads as its function of the weight, computed at each reading.

    That holds for every code that reads the attribute, not for `forward` only, and for every module that shares the
    weight. Functions of nested contexts are applied in the order in which the contexts were entered. What the module
    holds (`parameters()`, `state_dict()`, copies) stays as it is; gradients flow through the functions.

    Raises:
        BackboneError: there is no weight of that name.
    """
    places = _places(module)
    reads = [
        (one, key, function)
        for name, function in functions.items()
        for one, key in places[_held(*_place(module, name))]
    ]
    for one, key, function in reads:
        through = one.__dict__.get("through", {})
        _set(one, "through", through | {key: (*through.get(key, ()), function)})
    try:
        yield
    finally:
        for one, key, function in reads:
            through = dict(one.__dict__["through"])
            left = list(through.pop(key))
            left.remove(function)
            _set(one, "through", through | ({key: tuple(left)} if left else {}))


def lazies(module: nn.Module) -> Iterator[tuple[str, Lazy]]:
    """The weights below a module that are made at each use, by their full names."""
    for prefix, one in module.named_modules():
        for name, lazy in _lazy(one).items():
            yield f"{prefix}.{name}" if prefix else name, lazy


def weight_names(module: nn.Module) -> list[str]:
    """Names as of `named_parameters()`, those of weights made at each use included, in the order without such."""
    seen: dict[Any, str] = {}
    for prefix, one in module.named_modules():
        for key in one._parameters:
            seen.setdefault(_held(one, key), f"{prefix}.{key}" if prefix else key)
    return [name for held, name in seen.items() if held is not None]


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The weight of that name as the module holds or makes it, whatever it is read through; BackboneError if none."""
    held = _held(*_place(module, name))
    return held() if isinstance(held, Lazy) else held


def state(module: nn.Module) -> dict[str, Tensor]:
    """All weights by name, those made at each use as they are now; without gradients."""
    with torch.no_grad():
        return module.state_dict()


def shared_copy(module: nn.Module) -> Any:
    """A copy of a module that shares the memory of all its tensors, none of which asks for a gradient."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach()
    return _copied(module, memo)


def own_copy(module: nn.Module) -> Any:
    """A copy of a module with its own memory, in which no weight is made at each use any more."""
    other = _copied(module, {})
    with torch.no_grad():
        for held, places in _places(other).items():
            if isinstance(held, Lazy):
                value = nn.Parameter(held().detach().clone(), requires_grad=False)
                for one, key in places:
                    _put(one, key, value)
    return other


def _copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """A deep copy with the memory of what lazy weights are made of, and in which nothing is read through functions."""
    for _, lazy in lazies(module):
        memo[id(lazy.original)] = lazy.original
        memo |= {id(function): function for function in lazy.functions}
    other = copy.deepcopy(module, memo)
    for one in other.modules():
        _set(one, "through", {})
    return other


def replace_weights(module: nn.Module, weights: Mapping[str, Weight], source: str) -> None:
    """Put `weights` in the place of a module's own; BackboneError for a name or shape that it does not have.

    A weight that has several names (tied weights) is replaced under all of them.
    """
    places = _places(module)
    for name, weight in weights.items():
        place, _, key = name.rpartition(".")
        owner = _owner(module, place)
        if owner is None or not _has(owner, key):
            raise BackboneError(f"{source} has no weight called {name!r}.")
        held = _held(owner, key)
        old = (held() if isinstance(held, Lazy) else held).detach()
        with torch.no_grad():
            new = weight if isinstance(weight, Tensor) else weight(old)
        if not isinstance(new, Tensor) or new.shape != old.shape:
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise BackboneError(f"The weight {name!r} of {source} has the shape {tuple(old.shape)}, not {found}.")
        same = places.get(held, [(owner, key)])
        value = nn.Parameter(new.detach().to(old), requires_grad=False)  # one for all
        lazy = _with_function(held, weight) if not isinstance(weight, Tensor) else None
        for one, key in same:
            if lazy is None:
                _put(one, key, value)
            else:
                _add(one, key, lazy)


def _places(module: nn.Module) -> dict[Any, list[tuple[nn.Module, str]]]:
    """Where each weight below a module is: all (owner, name in it) of a parameter or a `Lazy`."""
    places: dict[Any, list[tuple[nn.Module, str]]] = {}
    for one in module.modules():
        for key in dict.fromkeys([*one._parameters, *_lazy(one)]):
            held = _held(one, key)
            if held is not None:
                places.setdefault(held, []).append((one, key))
    return places


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The owner of the parameter of that name, and its name there; BackboneError where there is none."""
    place, _, key = name.rpartition(".")
    owner = _owner(module, place)
    if owner is None or key not in owner._parameters or _held(owner, key) is None:
        raise BackboneError(f"The model has no weight called {name!r}.")
    return owner, key


def _owner(module: nn.Module, place: str) -> nn.Module | None:
    try:
        return module.get_submodule(place)
    except AttributeError:
        return None


def _has(module: nn.Module, key: str) -> bool:
    return key not in module._non_persistent_buffers_set and _held(module, key) is not None


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    """Make a plain tensor of a weight."""
    lazy = {name: one for name, one in _lazy(module).items() if name != key}
    _set(module, "lazy", lazy)
    if key in module._buffers:
        module._buffers[key] = value.detach()
    else:
        module._parameters[key] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


def _with_function(held: Any, function: Callable[[Tensor], Tensor]) -> Lazy:
    """What is held, going through one more function at each use."""
    if isinstance(held, Lazy):
        return Lazy(held.original, (*held.functions, function))
    return Lazy(held.detach(), (function,))


def _add(module: nn.Module, key: str, lazy: Lazy) -> None:
    """Let a weight be made at each use."""
    own: dict[str, Any] = module._buffers if key in module._buffers else module._parameters
    own[key] = None  # keeps its place, so that a plain weight comes back in the same order
    _set(module, "lazy", _lazy(module) | {key: lazy})
