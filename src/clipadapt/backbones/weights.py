"""Modules whose weights share memory with another module's, some replaced, some made at each use."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
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


class _HasLazy(nn.Module):
    """Mixed into the class of a module that makes some of its weights at each use; they are in its `lazy`.

    To those who read `state_dict`, or load one, they look like any other weight. Not among `parameters()`.
    """

    lazy: dict[str, Lazy]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("lazy", {}) and isinstance(value, Tensor):
            _put(self, name, value)
        else:
            super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, lazy in self.lazy.items():
            destination[prefix + name] = lazy() if keep_vars else lazy().detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = [name for name in self.lazy if prefix + name in state_dict]
        for name in given:
            _put(self, name, self.lazy[name]().detach().clone())
        if given:
            return self._load_from_state_dict(state_dict, prefix, *rest)  # of the class that it has now
        return super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for lazy in self.lazy.values():
            lazy.original = fn(lazy.original)
            for function in lazy.functions:
                if isinstance(function, nn.Module):
                    function._apply(fn)
        return self


@cache
def _with_lazy(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """`base` under its own name, with weights `names` that are made at each use."""
    made = {name: property(partial(_make, name)) for name in names}
    facts = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_plain_class": base}
    return type(base.__name__, (_HasLazy, base), made | facts)


def _make(name: str, module: _HasLazy) -> Tensor:
    return module.lazy[name]()


def _set_lazy(module: nn.Module, lazy: dict[str, Lazy]) -> None:
    """Make exactly these weights of a module at each use."""
    module.__dict__.pop("lazy", None)
    base = module._plain_class if isinstance(module, _HasLazy) else type(module)
    module.__class__ = _with_lazy(base, tuple(sorted(lazy))) if lazy else base  # type: ignore[assignment,arg-type]
    if lazy:
        module.__dict__["lazy"] = lazy


def lazies(module: nn.Module) -> Iterator[tuple[str, Lazy]]:
    """The weights below a module that are made at each use, by their full names."""
    for prefix, one in module.named_modules():
        for name, lazy in one.__dict__.get("lazy", {}).items():
            yield f"{prefix}.{name}" if prefix else name, lazy


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
    for _, lazy in lazies(module):
        memo[id(lazy.original)] = lazy.original
        memo |= {id(function): function for function in lazy.functions}
    return copy.deepcopy(module, memo)


def own_copy(module: nn.Module) -> Any:
    """A copy of a module with its own memory, in which no weight is made at each use any more."""
    memo: dict[int, Any] = {}
    for _, lazy in lazies(module):
        memo[id(lazy.original)] = lazy.original
        memo |= {id(function): function for function in lazy.functions}
    other = copy.deepcopy(module, memo)
    with torch.no_grad():
        for one in list(other.modules()):
            for name, lazy in list(one.__dict__.get("lazy", {}).items()):
                _put(one, name, lazy().detach().clone())
    return other


def replace_weights(module: nn.Module, weights: Mapping[str, Weight], source: str) -> None:
    """Put `weights` in the place of a module's own; BackboneError for a name or shape that it does not have.

    A parameter that has several names (tied weights) is replaced under all of them.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for one in module.modules():
        for key, parameter in one._parameters.items():
            if parameter is not None:
                places[id(parameter)].append((one, key))
    for name, weight in weights.items():
        place, _, key = name.rpartition(".")
        owner = _owner(module, place)
        if owner is None or not _has(owner, key):
            raise BackboneError(f"{source} has no weight called {name!r}.")
        old = getattr(owner, key).detach()
        with torch.no_grad():
            new = weight if isinstance(weight, Tensor) else weight(old)
        if not isinstance(new, Tensor) or new.shape != old.shape:
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise BackboneError(f"The weight {name!r} of {source} has the shape {tuple(old.shape)}, not {found}.")
        same = places.get(id(owner._parameters.get(key)), [(owner, key)])
        value = nn.Parameter(new.detach().to(old), requires_grad=False)  # one for all
        for one, key in same:
            if isinstance(weight, Tensor):
                _put(one, key, value if key in one._parameters else value.detach())
            else:
                _add(one, key, weight)


def _owner(module: nn.Module, place: str) -> nn.Module | None:
    try:
        return module.get_submodule(place)
    except AttributeError:
        return None


def _has(module: nn.Module, key: str) -> bool:
    if key in module._non_persistent_buffers_set:
        return False
    own = module._parameters.get(key) is not None or module._buffers.get(key) is not None
    return own or key in module.__dict__.get("lazy", {})


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    """Make a plain tensor of a weight."""
    lazy = dict(module.__dict__.get("lazy", {}))
    was_lazy = lazy.pop(key, None)
    if was_lazy is not None:
        _set_lazy(module, lazy)
    if key in module._buffers:
        module._buffers[key] = value
    else:
        module._parameters[key] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


def _add(module: nn.Module, key: str, function: Callable[[Tensor], Tensor]) -> None:
    """Let a weight go through one more function at each use."""
    lazy = dict(module.__dict__.get("lazy", {}))
    if key in lazy:
        old = lazy[key]
        lazy[key] = Lazy(old.original, (*old.functions, function))
    else:
        own: dict[str, Any] = module._buffers if key in module._buffers else module._parameters
        lazy[key] = Lazy(own[key].detach(), (function,))
        own[key] = None  # keeps its place, so that a plain weight comes back in the same order
    _set_lazy(module, lazy)
