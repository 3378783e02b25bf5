"""The adapted model on disk: a folder with `config.json` and one safetensors file, readable without this library.

`config.json` names the weights file and its checksum and is renamed into place last, so a reader sees either the
old model or the new one, whole, whatever interrupts a save.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

import clipadapt
from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data.examples import Examples
from clipadapt.errors import ArtifactError
from clipadapt.files import is_model, written_aside
from clipadapt.methods.base import Method
from clipadapt.methods.registry import create
from clipadapt.sources.images import ImageSource

FORMAT = 1  # raised when an older version of the library could not read the folder any more


def recipe(method: Method) -> dict[str, Any]:
    """A method's key and hyper-parameters as JSON values; a wrapped method nests, data sets and sources are named."""
    values = {f.name: _json(getattr(method, f.name)) for f in dataclasses.fields(method)}
    return {"method": method.card.key, "hyperparameters": values}


def _json(value: Any) -> Any:
    if isinstance(value, Method):
        return recipe(value)
    if isinstance(value, Examples | ImageSource) or callable(value):
        return getattr(value, "name", None) or getattr(value, "__name__", type(value).__name__)
    return str(value) if isinstance(value, Path) else value


def from_recipe(config: dict[str, Any]) -> Method:
    """The unfitted method that `recipe` described."""
    values = {
        k: from_recipe(v) if isinstance(v, dict) and v.keys() == {"method", "hyperparameters"} else v
        for k, v in config["hyperparameters"].items()
    }
    return create(config["method"], **values)


def learned(method: Method) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `fit` left in attributes that end in an underscore: tensors (also in dicts) and plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in vars(method).items():
        if not name.endswith("_") or name in ("backbone_", "origin_"):
            continue
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values()):
            tensors |= {f"{name}.{key}": v for key, v in value.items()}
        else:
            plain[name] = value
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, plain


def save(method: Method, folder: str | Path) -> Path:
    """Write a fitted method; see the module's docstring for why an interrupted save loses nothing."""
    origin = method._fitted("origin_")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; a model is saved as a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not is_model(folder):
        raise ArtifactError(f"{folder} holds other files and no clipadapt model; save to a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)

    tensors, plain = learned(method)
    blob = safetensors.torch.save(tensors)
    digest = hashlib.sha256(blob).hexdigest()
    weights = f"weights-{digest[:12]}.safetensors"
    config = {
        "format": FORMAT,
        "clipadapt": clipadapt.__version__,
        **recipe(method),
        "backbone": origin,
        "learned": plain,
        "weights": {"file": weights, "sha256": digest},
    }
    with written_aside(folder / weights) as aside:
        aside.write_bytes(blob)
    with written_aside(folder / "config.json") as aside:
        aside.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for stale in [*folder.glob("weights-*.safetensors"), *folder.glob(".*.tmp")]:  # an older model, a killed save
        if stale.name != weights:
            stale.unlink(missing_ok=True)
    return folder


def load(folder: str | Path, backbone: Backbone | None = None) -> Method:
    """A saved model, ready to predict; the backbone it names is loaded unless one is given.

    Raises `ArtifactError` where the folder is no model, is damaged, comes from a newer version, or was made on
    another backbone than the one at hand.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a saved model: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        version = int(config["format"])
        if missing := {"method", "hyperparameters", "backbone", "learned", "weights"} - config.keys():
            raise KeyError(min(missing))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: it is not a clipadapt model's JSON ({error!r}).") from None
    if version > FORMAT:
        raise ArtifactError(
            f"{folder} was saved by clipadapt {config.get('clipadapt', '?')} in format {version}; this is clipadapt "
            f"{clipadapt.__version__}, which reads formats up to {FORMAT}: upgrade clipadapt."
        )
    method = from_recipe(config)
    for name, tensor in _read_weights(folder, config["weights"]).items():
        name, dot, key = name.partition(".")
        if dot:
            vars(method).setdefault(name, {})[key] = tensor
        else:
            setattr(method, name, tensor)
    for name, value in config["learned"].items():
        setattr(method, name, value)

    method.origin_ = config["backbone"]
    if config["backbone"] is not None:
        source, fingerprint = config["backbone"]["source"], config["backbone"]["fingerprint"]
        backbone = backbone or load_backbone(source)
        if backbone.fingerprint != fingerprint:
            raise ArtifactError(
                f"{folder} was adapted from the backbone {source!r} ({fingerprint[:12]}), and {backbone.source!r} "
                f"({backbone.fingerprint[:12]}) is another one: its weights, preprocessing or tokenizer differ."
            )
        method._restore(backbone)
    else:
        method._restore(None)
    return method


def origin_of(folder: str | Path) -> dict[str, str] | None:
    """The backbone that a saved model was adapted from, {"source", "fingerprint"}.

    None where it was fitted on features, and where `load` would say what is wrong with the folder.
    """
    try:
        origin = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["backbone"]
        return {name: origin[name] for name in ("source", "fingerprint")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_weights(folder: Path, entry: dict[str, str]) -> dict[str, Tensor]:
    path = folder / entry["file"]
    if not path.is_file():
        raise ArtifactError(f"{folder} is incomplete: {entry['file']} is missing.")
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != entry["sha256"]:
        raise ArtifactError(f"{path} is damaged: its checksum differs from the one in config.json.")
    return safetensors.torch.load(blob)
