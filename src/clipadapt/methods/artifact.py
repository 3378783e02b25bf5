"""The adapted model on disk: a folder with `config.json` and one safetensors file, readable without this library.

`config.json` names the weights file and its checksum and is renamed into place last, so a reader sees either the
old model or the new one, whole, whatever interrupts a save. A method that wraps others nests what these learned.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from clipadapt import __version__
from clipadapt.errors import ArtifactError
from clipadapt.files import is_model, written_aside
from clipadapt.methods.recipe import recipe

FORMAT = 2  # raised when an older version of the library could not read the folder any more
NESTED = "nested methods"  # marks an attribute that holds fitted methods


def learned(method: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `fit` left in attributes that end in an underscore: tensors and plain values, by name.

    A dict of tensors gives one "NAME.KEY" each. A fitted method, or a list of such, gives its tensors under
    "NAME.I.", and in the plain values its recipe, backbone and own plain values.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in vars(method).items():
        if not name.endswith("_") or name in ("backbone_", "origin_"):
            continue
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values()):
            tensors |= {f"{name}.{key}": v for key, v in value.items()}
        elif isinstance(value, list) and value and all(hasattr(v, "card") for v in value):
            plain[name] = {NESTED: []}
            for number, inner in enumerate(value):
                own, more = learned(inner)
                tensors |= {f"{name}.{number}.{key}": v for key, v in own.items()}
                plain[name][NESTED].append({**recipe(inner), "backbone": inner.origin_, "learned": more})
        else:
            plain[name] = value
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, plain


def save(method: Any, folder: str | Path) -> Path:
    """Write a fitted method; see the module's docstring for why an interrupted save loses nothing."""
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
        "clipadapt": __version__,
        **recipe(method),
        "backbone": method.origin_,
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


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a saved model, checked.

    Raises:
        ArtifactError: the folder is not a saved model, is damaged, or comes from a newer version.
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
            f"{__version__}, which reads formats up to {FORMAT}: upgrade clipadapt."
        )
    return config, _read_weights(folder, config["weights"])


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
