"""Models saved in format 1 (clipadapt 0.1), turned into what format 2 would have kept."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from clipadapt.methods.artifact import NESTED
from clipadapt.methods.recipe import is_recipe

# The learned attributes whose numbers were trained; methods that are not here have prompts in `learned_`, or nothing.
TRAINED = {
    "ape-t": (),
    "clap": ("weight_",),
    "clip-adapter": ("w1_", "w2_"),
    "clip-lora": ("lora_",),
    "clipood": ("tower_",),
    "cross-modal-probe": ("weight_",),
    "fine-tune": ("tower_", "weight_"),
    "flyp": ("tower_",),
    "full-fine-tune": ("tower_",),
    "labclip": ("map_", "scale_"),
    "linear-probe": ("weight_", "bias_"),
    "lp++": ("weight_", "alpha_"),
    "m2-mix": ("tower_",),
    "mf-adapter": ("keys_", "down_", "up_"),
    "multi-modal-adapter": ("adapter_",),
    "omniview-tuning": ("lora_",),
    "r-adapter": ("adapters_",),
    "reco": ("fusion_",),
    "saft": ("values_",),
    "taskres": ("weight_",),
    "tip-adapter-f": ("keys_",),
    "vdt-adapter": ("adapter_",),
    "vl-adapter": ("adapters_",),
}


def upgraded(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a model in format 1 as format 2 has them."""
    plain = dict(config["learned"])
    config = {**config, "learned": plain}
    key = config["method"]
    if key == "ship":
        return _ship(config, tensors)
    if key == "backbone-effects-study":
        return _backbone_effects(config, tensors)
    plain.setdefault("trained_", _trained(key, config["hyperparameters"], tensors))
    return config, {_renamed(path): tensor for path, tensor in tensors.items()}


def _renamed(path: str) -> str:
    """What of a model changes was kept under five names, and is `update_` now."""
    name, _, key = path.partition(".")
    if name in ("tower_", "lora_", "adapters_"):
        return f"update_.{key}"
    if name in ("places_", "values_") and key:
        return f"update_.{key}.{name[:-1]}"
    return "update_.tokens" if name == "tokens_" else path


def _trained(key: str, hyperparameters: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    if key == "ape-t":
        return tensors["weight_"].shape[0] * len(tensors["channels_"]) + len(tensors["keys_"])
    names = TRAINED.get(key, ("learned_",))
    if key == "lp++" and hyperparameters["variant"] == "official":
        names += ("bias_",)
    return sum(prod(tensor.shape) for path, tensor in tensors.items() if path.partition(".")[0] in names)


def _inner(outer: dict[str, Any], plain: dict[str, Any], tensors: dict[str, Tensor], origin: Any) -> dict[str, Any]:
    """A wrapped method as format 2 nests it."""
    method = outer["hyperparameters"]["method"]
    if not is_recipe(method):
        method = {"method": method, "hyperparameters": {"templates": outer["hyperparameters"]["templates"]}}
    trained = _trained(method["method"], method["hyperparameters"], tensors)
    return {**method, "backbone": origin, "learned": {"trained_": trained, **plain}}


def _ship(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The wrapped method's state was the wrapper's own."""
    inner = _inner(config, config["learned"], tensors, config["backbone"])
    own = {name: config["learned"][name] for name in ("class_names_", "dim_", "multi_label_", "threshold_")}
    learned = {**own, "trained_": inner["learned"]["trained_"], "inner_": {NESTED: [inner]}}
    return {**config, "learned": learned}, {f"inner_.0.{path}": tensor for path, tensor in tensors.items()}


def _backbone_effects(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of the methods on several backbones was flattened by hand."""
    learned = dict(config["learned"])
    origins = [config["backbone"], *learned.pop("others_")]
    inner, moved = [], {path: tensor for path, tensor in tensors.items() if not path.startswith("tensors_.")}
    for number, (plain, origin) in enumerate(zip(learned.pop("plain_"), origins, strict=True)):
        prefix = f"tensors_.{number}."
        own = {path.removeprefix(prefix): tensor for path, tensor in tensors.items() if path.startswith(prefix)}
        moved |= {f"inner_.{number}.{path}": tensor for path, tensor in own.items()}
        inner.append(_inner(config, plain, own, origin))
    trained = 2 * len(inner) + sum(one["learned"]["trained_"] for one in inner)
    return {**config, "learned": {**learned, "trained_": trained, "inner_": {NESTED: inner}}}, moved
