"""WebDataset shards: tar files in which the files of one sample share their name up to the first dot."""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipadapt.data.examples import Dataset
from clipadapt.data.items import FileItem
from clipadapt.data.readers.folders import IMAGE_SUFFIXES
from clipadapt.data.readers.lists import image_list
from clipadapt.errors import DataError

_TEXTS = ("json", "cls", "txt")


def webdataset(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    class_names: Sequence[str] | None = None,
    label: str = "label",
) -> Dataset:
    """The labelled images in local, uncompressed WebDataset shards, in their order there.

    A shard's table of contents is read once; its images are then read in place, in any order.

    Args:
        shards: tar files, or one path that may contain `*`.
        class_names: names for integer labels; without them the numbers are the names.
        label: which field of a sample's `.json` is its label when it has no `.cls` file.

    Raises:
        DataError: no shard is found, one is compressed or damaged, or an image has no label.
    """
    items, labels = [], []
    for shard in _shard_paths(shards):
        for sample in read_samples(shard):
            items.append(sample.image)
            labels.append(_label(sample, label, f"{shard}, sample {sample.key!r}"))
    return image_list(items, labels, class_names, name="shards")


@dataclass(frozen=True)
class Sample:
    """One sample of a shard."""

    key: str  # what the names of its files begin with, up to the first dot
    image: FileItem
    texts: dict[str, bytes]  # content of its .json, .cls and .txt by ending, without the dot


def read_samples(shard: str, name: str | None = None) -> list[Sample]:
    """The samples of a local, uncompressed shard that have an image, in their order there.

    Only the table of contents and the short texts are read. `name` is what to call the shard instead of its path.

    Raises:
        DataError: it is compressed or damaged.
    """
    name = name or shard
    found = []
    try:
        with tarfile.open(shard, "r:") as archive:
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in archive:
                if member.isfile():
                    folder, file = os.path.split(member.name)
                    key, _, ending = file.partition(".")
                    samples.setdefault(os.path.join(folder, key), {})[ending.lower()] = member
            for key, members in samples.items():
                image = next((end for end in members if f".{end}" in IMAGE_SUFFIXES), None)
                if image is None:
                    continue
                texts = {end: _content(archive, members[end]) for end in _TEXTS if end in members}
                member = members[image]
                item = FileItem(shard, member.offset_data, member.size, f"{name}:{member.name}")
                found.append(Sample(key, item, texts))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{name} cannot be read as an uncompressed tar file: {error}.") from None
    return found


def _shard_paths(shards: Any) -> list[str]:
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    paths = [path for pattern in map(str, given) for path in (sorted(glob.glob(pattern)) or [pattern])]
    missing = next((path for path in paths if not os.path.isfile(path)), None)
    if missing is not None or not paths:
        raise DataError(f"{missing or 'An empty list'} names no shard; local .tar files are needed.")
    return paths


def _label(sample: Sample, field: str, where: str) -> str | int:
    if "cls" in sample.texts:
        value = sample.texts["cls"].decode().strip()
    elif "json" in sample.texts:
        try:
            value = json.loads(sample.texts["json"]).get(field)
        except ValueError as error:
            raise DataError(f"{where}: its .json is not valid: {error}.") from None
    else:
        value = None
    if value is None:
        raise DataError(f"{where} has no label; a .cls file or a .json file with the field {field!r} is needed.")
    return int(value) if str(value).isdecimal() else str(value)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # members are regular files
    return file.read()
