"""Saved models back into memory, also those of older formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.errors import ArtifactError
from clipadapt.methods.artifact import NESTED, read
from clipadapt.methods.format1 import upgraded
from clipadapt.methods.recipe import is_recipe
from clipadapt.methods.registry import create


def from_recipe(config: dict[str, Any]) -> Any:
    """The unfitted method that `recipe` described."""
    values = {k: from_recipe(v) if is_recipe(v) else v for k, v in config["hyperparameters"].items()}
    return create(config["method"], **values)


def load(folder: str | Path, backbone: Backbone | None = None) -> Any:
    """A saved model, ready to predict; the backbone it names is loaded unless one is given.

    Raises:
        ArtifactError: the folder is not a saved model, is damaged, comes from a newer version, or was made on another
            backbone than the one that is given or that its name now stands for.
    """
    config, tensors = read(folder)
    if config["format"] == 1:
        config, tensors = upgraded(config, tensors)
    return _restored(config, tensors, str(folder), backbone)


def _restored(
    config: dict[str, Any], tensors: dict[str, Tensor], where: str, backbone: Backbone | None, device: Any = "cpu"
) -> Any:
    """The fitted method of a configuration, whose wrapped ones may have been fitted on other backbones."""
    method, nested = from_recipe(config), {}
    for name, value in config["learned"].items():
        if isinstance(value, dict) and value.keys() == {NESTED}:
            nested[name] = value[NESTED]
            setattr(method, name, [])  # its place among the others
        else:
            setattr(method, name, value)
    for path, tensor in tensors.items():
        name, dot, key = path.partition(".")
        if name in nested:
            continue
        if dot:
            vars(method).setdefault(name, {})[key] = tensor
        else:
            setattr(method, name, tensor)
    method.origin_ = config["backbone"]
    backbone = _backbone_for(config["backbone"], where, backbone, device)
    device = device if backbone is None else backbone.device
    for name, configs in nested.items():
        inner = []
        for number, one in enumerate(configs):
            prefix = f"{name}.{number}."
            own = {path.removeprefix(prefix): tensor for path, tensor in tensors.items() if path.startswith(prefix)}
            same = one["backbone"] is not None and one["backbone"] == config["backbone"]
            inner.append(_restored(one, own, where, backbone if same else None, device))
        setattr(method, name, inner)
    method._restore(backbone)
    return method


def _backbone_for(origin: dict[str, str] | None, where: str, backbone: Backbone | None, device: Any) -> Backbone | None:
    if origin is None:
        return None
    backbone = backbone or load_backbone(origin["source"], device)
    if backbone.fingerprint != origin["fingerprint"]:
        raise ArtifactError(
            f"{where} was adapted from the backbone {origin['source']!r} ({origin['fingerprint'][:12]}), and "
            f"{backbone.source!r} ({backbone.fingerprint[:12]}) is another one: its weights, preprocessing or "
            "tokenizer differ."
        )
    return backbone
