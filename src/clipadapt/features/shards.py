"""Encoding spread over processes or machines: each writes a shard, the last step merges them."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clipadapt.data import as_items
from clipadapt.errors import ArtifactError, ClipadaptError
from clipadapt.features.encode import encode_images
from clipadapt.features.store import checksum
from clipadapt.files import written_aside

if TYPE_CHECKING:
    from clipadapt.backbones import Backbone


# What the features depend on, with its defaults.
_RESULT_OPTIONS = {
    name: inspect.signature(encode_images).parameters[name].default
    for name in ("views", "seed", "min_scale", "precision")
}


class Merged(NamedTuple):
    """All shards as one.

    Attributes:
        features: (N, D) or (N, V, D), mapped from `features.safetensors`, in the order of the pictures.
        names: of the N pictures.
        skipped: (name, reason) of the pictures that could not be read.
        fingerprint: of the backbone.
    """

    features: torch.Tensor
    names: list[str]
    skipped: list[tuple[str, str]]
    fingerprint: str


def encode_shard(backbone: Backbone, images: Any, out: Path | str, shard: tuple[int, int], **options: Any) -> Path:
    """Encode the i-th of n stretches of `images` into the folder `out`; any launcher may run the n calls anywhere.

    The shard's `.json` appears last and marks it as done: calling again for a shard that is done changes nothing and
    takes no time, and one that was interrupted continues where it was.

    Args:
        backbone: as for `encode_images`.
        images: all pictures, the same list in every call.
        out: folder that the n calls share.
        shard: (i, n) with 0 <= i < n.
        options: of `encode_images`, except `cache`: features of unfinished shards are kept in `out`.

    Returns:
        The shard's `.json` file.

    Raises:
        ClipadaptError: the shard's numbers are out of range.
        ArtifactError: `out` has this shard already, of other pictures, of another backbone or with other options.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ClipadaptError(f"Shard {index} of {count} does not exist; shards are numbered from 0 to count - 1.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    items = as_items(images)
    mine = items[len(items) * index // count : len(items) * (index + 1) // count]
    made_of: dict[str, Any] = {
        "fingerprint": backbone.fingerprint,
        "pictures": _hash_lines(item.name for item in items),
        "options": {name: options.get(name, default) for name, default in _RESULT_OPTIONS.items()},
        "shards": count,
    }
    stem = f"shard-{index:05d}-of-{count:05d}"
    marker, work = out / f"{stem}.json", out / f".{stem}"
    if marker.exists():
        if any(_read_marker(marker)[key] != value for key, value in made_of.items()):
            raise ArtifactError(f"{marker} is of other pictures, another backbone or other options; use a new folder.")
        return marker

    encoded = encode_images(backbone, mine, cache=work, **options)
    features = np.ascontiguousarray(encoded.features.numpy(), made_of["options"]["precision"])
    with written_aside(out / f"{stem}.safetensors") as aside:
        save_file({"features": features}, aside)
    state = made_of | {
        "shard": index,
        "checksum": checksum(features),
        "names": [mine[position].name for position in encoded.kept],
        "skipped": encoded.skipped,
    }
    with written_aside(marker) as aside:
        aside.write_text(json.dumps(state), encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return marker


def merge(out: Path | str) -> Merged:
    """Join all shards in `out` into `features.safetensors` and `features.json`, in the order of the pictures.

    The shards stay. One shard at a time is in memory.

    Raises:
        ArtifactError: shards are missing (it names them), damaged, or do not belong together.
    """
    out = Path(out)
    states = sorted((_read_marker(path) for path in out.glob("shard-*.json")), key=lambda state: state["shard"])
    if not states:
        raise ArtifactError(f"{out} holds no finished shard; run encode_shard() first.")
    first = states[0]
    for key in ("fingerprint", "pictures", "options", "shards"):
        if any(state[key] != first[key] for state in states):
            raise ArtifactError(f"The shards in {out} differ in their {key}; use one folder per encoding.")
    missing = sorted(set(range(first["shards"])) - {state["shard"] for state in states})
    if missing:
        raise ArtifactError(
            f"{out} is incomplete: shard {', '.join(map(str, missing))} of {first['shards']} is not done yet."
        )
    names = [name for state in states for name in state["names"]]
    skipped = [(name, reason) for state in states for name, reason in state["skipped"]]
    whole = out / "features.safetensors"
    _concatenate(out, states, whole)
    with written_aside(out / "features.json") as aside:
        summary = {"fingerprint": first["fingerprint"], "names": names, "skipped": skipped}
        aside.write_text(json.dumps(summary), encoding="utf-8")
    return Merged(_mapped(whole), names, skipped, first["fingerprint"])


def _concatenate(out: Path, states: list[dict[str, Any]], whole: Path) -> None:
    """Stream the shards' rows into one safetensors file: 8 bytes of length, a JSON header, the rows."""
    shards = [_mapped(out / f"shard-{s['shard']:05d}-of-{s['shards']:05d}.safetensors").numpy() for s in states]
    shape = [sum(len(shard) for shard in shards), *shards[0].shape[1:]]
    size = sum(shard.nbytes for shard in shards)
    dtype = {"float32": "F32", "float16": "F16"}[str(shards[0].dtype)]
    header = json.dumps({"features": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with written_aside(whole) as aside, aside.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for state, features in zip(states, shards, strict=True):
            if checksum(features) != state["checksum"]:
                raise ArtifactError(
                    f"Shard {state['shard']} of {out} is damaged; delete its .json and encode it again."
                )
            file.write(features.data)


def _mapped(path: Path) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("features")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); delete its .json and encode it again.") from None


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ArtifactError(f"{path} is damaged; delete it and encode that shard again.") from None


def _hash_lines(lines: Iterable[str]) -> str:
    return blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
