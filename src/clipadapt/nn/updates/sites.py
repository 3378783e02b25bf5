"""Updates at sites: what a named sub-module of a model gives goes through a small part, by a hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from clipadapt.errors import ClipadaptError
from clipadapt.nn.updates.update import Update


class SiteUpdate(Update):
    """One part for each named site of a model; a part may stand at several sites, and is then trained as one.

    Args:
        model: On whose device the parts are put.
        parts: By the site's name, a module (B, ..., W) -> (B, ..., W) that the site's output goes through.

    A site gives a tensor, or a tuple whose first element is changed.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not parts:
            raise ClipadaptError(f"{type(self).__name__} needs at least one site.")
        self.parts = nn.ModuleList(dict.fromkeys(parts.values()))
        place = {part: number for number, part in enumerate(self.parts)}
        self.sites = {name: place[part] for name, part in parts.items()}
        if not any(parameter.is_meta for parameter in self.parameters()):  # in `restore` there is nothing to move yet
            self.to(device_of(model))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], model: nn.Module, *args: Any, **settings: Any) -> Self:
        """The update that was saved as `tensors` and made as `cls(model, *args, **settings)`; frozen, nothing drawn."""
        with torch.device("meta"):
            update = cls(model, *args, **settings)
        return update.load(tensors).to(device_of(model))

    def at(self, site: str) -> Any:
        """The part that stands at `site`."""
        return self.parts[self.sites[site]]

    @contextmanager
    def _computing(self, model: nn.Module) -> Iterator[None]:
        modules = {name: site_of(model, name) for name in self.sites}
        handles = [module.register_forward_hook(self._hook(self.at(name), module)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, part: nn.Module, site: nn.Module) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if module is not site:  # but a copy that was made meanwhile, hooks included
                return output
            if isinstance(output, tuple):
                return (self._output(part, inputs, output[0]), *output[1:])
            return self._output(part, inputs, output)

        return hook

    def _output(self, part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """What a site gives with its part: the plain `output` (B, ..., W) changed, which it made of `inputs`."""
        return part(output)


def site_of(model: nn.Module, name: str) -> Any:
    """The sub-module of that name; ClipadaptError where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ClipadaptError(f"The model has no module called {name!r} to put an adapter behind.") from error


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def linear_site(model: nn.Module, name: str, kind: str) -> nn.Linear:
    """The site of that name; ClipadaptError unless it is a linear layer, which an update of this `kind` needs."""
    site = site_of(model, name)
    if not isinstance(site, nn.Linear):
        raise ClipadaptError(f"{kind} needs linear layers, and {name!r} is a {type(site).__name__}.")
    return site
