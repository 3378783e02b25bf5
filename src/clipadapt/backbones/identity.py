"""What identifies a model: digests of its weights, made again only where something was written."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipadapt.backbones.weights import lazies, state

SAMPLE = 32  # values of each tensor that are looked at to notice what was written through `.data`


class _Known(NamedTuple):
    """One weight as it was when its digest was made; the sample keeps its memory from being used again."""

    stamp: tuple[int, int]
    sample: Tensor
    values: Tensor
    digest: bytes


class WeightDigests:
    """The digests of a module's weights by name, the same dictionary as long as nothing has changed.

    Noticed are other tensors or modules in the place of the old ones, whatever torch counts as a change in place
    (`load_state_dict`, optimizer steps, `add_` and so on), and what was written through `.data` or a NumPy view if it
    changes one of `SAMPLE` values of the tensor, evenly strided from the first. So a merge or a new initialisation is
    noticed; a few elements of a large tensor that were written through `.data` may not be, nor are changes of what the
    function of a weight made at each use (`Model.with_weights`) has in its closure.
    """

    def __init__(self, before: WeightDigests | None = None) -> None:
        self._seen: tuple[list[Any], list[tuple[int, int]]] | None = None
        self._samples: list[list[Tensor]] = []
        self._values: list[Tensor] = []
        self._digests: dict[str, bytes] = {}
        self._known: dict[str, _Known] = {} if before is None else before._known

    def of(self, module: nn.Module) -> dict[str, bytes]:
        """{name: digest}, in the order of the names."""
        keys, tensors = _walk(module)
        seen = keys, [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if seen != self._seen or not self._same_samples():
            self._samples = _samples(tensors)
            self._values = [torch.cat(group) for group in self._samples]
            self._digests = self._made_again(module)
            self._seen = seen
        return self._digests

    def _same_samples(self) -> bool:
        # compared as bits, since NaN differs from itself
        return all(
            torch.equal(_bits(torch.cat(group)), _bits(values))
            for group, values in zip(self._samples, self._values, strict=True)
        )

    def _made_again(self, module: nn.Module) -> dict[str, bytes]:
        found, fleeting = state(module), {name for name, _ in lazies(module)}
        known: dict[str, _Known] = {}
        for name, tensor in found.items():
            old = self._known.get(name)
            if name not in fleeting and old is not None and old.stamp == _stamp(tensor):
                if torch.equal(_bits(_sample(tensor)), _bits(old.values)):
                    known[name] = old
        names = sorted(found)
        new = [name for name in names if name not in known]
        with ThreadPoolExecutor() as pool:  # hashing large buffers releases the interpreter lock
            digests = dict(zip(new, pool.map(_weight_digest, new, [found[name] for name in new]), strict=True))
        for name in new:
            if name not in fleeting:
                sample = _sample(found[name])
                known[name] = _Known(_stamp(found[name]), sample, sample.clone(), digests[name])
        self._known = known
        return {name: digests[name] if name in digests else known[name].digest for name in names}


def _walk(module: nn.Module) -> tuple[list[Any], list[Tensor]]:
    """All tensors below a module, and what says under which names they are; as quick as can be."""
    keys: list[Any] = []
    tensors: list[Tensor] = []
    waiting = [module]
    while waiting:
        one = waiting.pop()
        own: dict[str, Any] = one._parameters
        keys.extend(own)
        tensors.extend([tensor for tensor in own.values() if tensor is not None])
        if one._buffers:
            keys.extend(one._buffers)
            tensors.extend([tensor for tensor in one._buffers.values() if tensor is not None])
        children: dict[str, Any] = one._modules
        keys.extend(children)
        waiting.extend([child for child in children.values() if child is not None])
        for name, lazy in one.__dict__.get("lazy", {}).items():
            keys += [name, *lazy.functions]
            tensors.append(lazy.original)
            waiting += [function for function in lazy.functions if isinstance(function, nn.Module)]
    return keys, tensors


def _samples(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Samples of all tensors, those of one device and type together."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device, tensor.dtype].append(_sample(tensor))
    return list(groups.values())


def _sample(tensor: Tensor) -> Tensor:
    """At most about `SAMPLE` values of a tensor, in its own memory."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)]


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _stamp(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def _weight_digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{name} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.digest()
