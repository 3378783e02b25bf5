"""What identifies a model: digests of its weights, made again only where something was written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clipadapt.backbones.weights import lazies, state

SAMPLE = 32  # about this many values of each tensor are read to notice what was written through `.data`
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Known(NamedTuple):
    """One weight as it was when its digest was made. The sample keeps its memory from being used for another."""

    stamp: tuple[int, int]
    sample: Tensor
    values: bytes
    digest: bytes


class WeightDigests:
    """The digests of a module's weights by name, the same dictionary as long as nothing has changed.

    Noticed are other tensors or modules in the place of the old ones, whatever torch counts as a change in place
    (`load_state_dict`, optimizer steps, `add_` and so on), and what was written through `.data` or a NumPy view if it
    changes one of about 32 values of the tensor, evenly strided from the first. So a merge or a new initialisation is
    noticed. Not noticed are a few elements of a large tensor that were written through `.data`, and changes of what
    the function of a weight made at each use (`Model.with_weights`) reads, unless it is a module with that as a weight.

    before  digests of another module that shares memory with this one
    """

    def __init__(self, before: WeightDigests | None = None) -> None:
        self._seen: tuple[list[Any], list[tuple[int, int]]] | None = None
        self._samples = _Samples([])
        self._values = b""
        self._digests: dict[str, bytes] = {}
        self._known: dict[str, _Known] = {} if before is None else before._known

    def of(self, module: nn.Module) -> dict[str, bytes]:
        """{name: digest}, in the order of the names."""
        keys, tensors = _walk(module)
        seen = keys, [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if seen != self._seen or self._samples.read() != self._values:
            self._samples = _Samples(tensors)
            self._values = self._samples.read()
            self._digests = self._made_again(module)
            self._seen = seen
        return self._digests

    def _made_again(self, module: nn.Module) -> dict[str, bytes]:
        found, fleeting = state(module), {name for name, _ in lazies(module)}
        stamps = {name: (tensor.data_ptr(), tensor._version) for name, tensor in found.items() if name not in fleeting}
        samples = {name: _sample(found[name]) for name in stamps}
        values = {name: _Samples([found[name]]).read() for name in stamps}
        known = {
            name: old
            for name, old in self._known.items()
            if name in stamps and (old.stamp, old.values) == (stamps[name], values[name])
        }
        new = [name for name in found if name not in known]
        with ThreadPoolExecutor() as pool:  # hashing large buffers releases the interpreter lock
            digests = dict(zip(new, pool.map(_weight_digest, new, [found[name] for name in new]), strict=True))
        known |= {
            name: _Known(stamps[name], samples[name], values[name], digests[name]) for name in new if name in stamps
        }
        self._known = known
        return {name: known[name].digest if name in known else digests[name] for name in sorted(found)}


def _walk(module: nn.Module) -> tuple[list[Any], list[Tensor]]:
    """All tensors below a module, and what says under which names they are; as quick as can be."""
    keys: list[Any] = []
    tensors: list[Any] = []
    waiting: list[Any] = [module]
    for one in waiting:
        if one is None:
            continue
        own = one.__dict__
        for tensors_of in (own["_parameters"], own["_buffers"]):
            if tensors_of:
                keys += tensors_of
                tensors += tensors_of.values()
        if own["_modules"]:
            keys += own["_modules"]
            waiting += own["_modules"].values()
        for name, lazy in own.get("lazy", {}).items():
            keys += [name, *lazy.functions]
            tensors.append(lazy.original)
            waiting += [function for function in lazy.functions if isinstance(function, nn.Module)]
    return keys, [tensor for tensor in tensors if tensor is not None]


class _Samples:
    """Samples of many tensors, read together."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        samples = [_sample(tensor) for tensor in tensors]
        self._here = [sample.numpy() for sample in samples if sample.device.type == "cpu"]
        self._there = [sample for sample in samples if sample.device.type != "cpu"]

    def read(self) -> bytes:
        """The present values."""
        here = np.concatenate(self._here).tobytes() if self._here else b""
        return here + torch.cat(self._there).cpu().numpy().tobytes() if self._there else here


def _sample(tensor: Tensor) -> Tensor:
    """Some values of a tensor as integers of the same bits, in its own memory."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].view(_INTEGERS[tensor.element_size()])


def _weight_digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{name} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.digest()
