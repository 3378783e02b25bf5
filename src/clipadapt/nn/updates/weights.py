"""Updates of named weights: all of their values, or a few chosen ones.

full      W' = theta                         theta has the shape of W and starts as W
sparse    W'[places] = values                all other values of W stay as they are
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import ClassVar, Self

from torch import Tensor, nn

from clipadapt.backbones.weights import read_through, weight_of
from clipadapt.errors import ClipadaptError
from clipadapt.nn.updates.update import Change, Update, check_tensors


class Full(Update):
    """The named weights themselves: each is trained as a copy, and the model keeps its own.

    Args:
        model: Whose weights they are.
        names: Names as in `model.named_parameters()`.
        values: What they start as, by the same names; as in the model without.

    Saved under these names.
    """

    mergeable: ClassVar[bool] = True

    def __init__(self, model: nn.Module, names: Iterable[str], values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.names = list(names)
        if not self.names:
            raise ClipadaptError("Full needs the name of at least one weight.")
        own = {name: weight_of(model, name) for name in self.names}
        start = own if values is None else values
        check_tensors("Full", start, {name: weight.shape for name, weight in own.items()})
        self.weights = nn.ParameterList(
            nn.Parameter(start[name].detach().to(weight.device, weight.dtype, copy=True))
            for name, weight in own.items()
        )

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], model: nn.Module) -> Self:
        """The update of `model` that was saved as `tensors`, or any weights by name; frozen."""
        return cls(model, tensors, tensors).frozen()

    def _computing(self, model: nn.Module) -> AbstractContextManager[None]:
        return read_through(model, {name: _constant(weight) for name, weight in self.by_name().items()})

    def changes(self, factor: float = 1.0) -> dict[str, Change]:
        """See `Update.changes`: (1 - factor) W + factor theta."""

        def change(weight: Tensor) -> Change:
            if factor == 1:
                return lambda original: weight.to(original.device)
            return lambda original: (1 - factor) * original + factor * weight.to(original.device)

        return {name: change(weight.detach()) for name, weight in self.by_name().items()}

    def _saved_name(self, key: str) -> str:
        return self.names[int(key.rpartition(".")[2])]


class Sparse(Update):
    """A few values of named weights: those at chosen places.

    Args:
        model: Whose weights they are.
        places: For each weight that changes, flat indices (n,), each at most once.
        values: What these start as, (n,) each; as in the model without.

    Saved as "NAME.values" and "NAME.places" (int32). While attached, a weight is put together at each reading.
    Not `cheap`: each reading copies the weight, which takes 1.3 times as long on one image, and 1.03 times on 64.
    """

    mergeable: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, places: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.names = list(places)
        if not self.names:
            raise ClipadaptError("Sparse needs places in at least one weight.")
        if values is not None:
            check_tensors("Sparse", values, {name: where.shape for name, where in places.items()})
        self.values = nn.ParameterList()
        for number, (name, chosen) in enumerate(places.items()):
            weight = weight_of(model, name).detach()
            if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < weight.numel():
                raise ClipadaptError(f"Places in {name!r} must be from 0 to {weight.numel() - 1}.")
            where = chosen.to(weight.device)
            start = weight.flatten()[where.long()] if values is None else values[name].detach()
            self.values.append(nn.Parameter(start.to(weight.device, weight.dtype, copy=True)))
            self.register_buffer(f"places_{number}", where.int())

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], model: nn.Module) -> Self:
        """The update of `model` that was saved as `tensors`; frozen."""
        parts: dict[str, dict[str, Tensor]] = {"places": {}, "values": {}}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            if part not in parts:
                raise ClipadaptError(f"Sparse has no tensor called {key!r}; its tensors end in .places and .values.")
            parts[part][name] = tensor
        return cls(model, parts["places"], parts["values"]).frozen()

    def _parts(self) -> Iterable[tuple[str, Tensor, Tensor]]:
        """Name, flat places (n,) int64 and values (n,) of each weight."""
        for number, (name, values) in enumerate(zip(self.names, self.values, strict=True)):
            yield name, getattr(self, f"places_{number}").long(), values

    def _computing(self, model: nn.Module) -> AbstractContextManager[None]:
        return read_through(model, {name: _put_in(where, values) for name, where, values in self._parts()})

    def changes(self, factor: float = 1.0) -> dict[str, Change]:
        """See `Update.changes`: the chosen places hold (1 - factor) w + factor v."""

        def change(where: Tensor, values: Tensor) -> Change:
            def changed(original: Tensor) -> Tensor:
                there, new = where.to(original.device), values.to(original.device)
                if factor != 1:
                    new = (1 - factor) * original.flatten()[there] + factor * new
                return _put_in(there, new)(original)

            return changed

        return {name: change(where, values.detach()) for name, where, values in self._parts()}

    def _saved_name(self, key: str) -> str:
        part, number = key.replace("places_", "places.").split(".")
        return f"{self.names[int(number)]}.{part}"


def _constant(weight: Tensor) -> Change:
    return lambda original: weight


def _put_in(where: Tensor, values: Tensor) -> Change:
    """A weight with `values` (n,) at the flat places `where` (n,); gradients flow to the values."""
    return lambda original: original.flatten().index_put((where,), values).view_as(original)
