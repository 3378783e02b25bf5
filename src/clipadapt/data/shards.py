"""WebDataset shards: tar files in which the files of one sample share their name up to the first dot."""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipadapt.data.dataset import Dataset
from clipadapt.data.folders import PICTURE_SUFFIXES
from clipadapt.data.items import FileItem
from clipadapt.data.lists import image_list
from clipadapt.errors import DataError


def webdataset(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    class_names: Sequence[str] | None = None,
    label: str = "label",
) -> Dataset:
    """The labelled pictures in local, uncompressed WebDataset shards, in the order they lie there.

    A shard's table of contents is read once; its pictures are then read in place, in any order.

    Args:
        shards: tar files, or one path that may contain `*`.
        class_names: names for integer labels; without them the numbers are the names.
        label: which field of a sample's `.json` is its label when it has no `.cls` file.

    Raises:
        DataError: no shard is found, one is compressed or damaged, or a picture has no label.
    """
    items, labels = [], []
    for shard in _shard_paths(shards):
        try:
            with tarfile.open(shard, "r:") as archive:
                samples: dict[str, dict[str, tarfile.TarInfo]] = {}
                for member in archive:
                    if member.isfile():
                        folder, file = os.path.split(member.name)
                        key, _, ending = file.partition(".")
                        samples.setdefault(os.path.join(folder, key), {})[ending.lower()] = member
                for key, members in samples.items():
                    picture = next((end for end in members if f".{end}" in PICTURE_SUFFIXES), None)
                    if picture is None:
                        continue
                    labels.append(_label(archive, members, label, f"{shard}, sample {key!r}"))
                    member = members[picture]
                    items.append(FileItem(shard, member.offset_data, member.size, f"{shard}:{member.name}"))
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{shard} cannot be read as an uncompressed tar file: {error}.") from None
    return image_list(items, labels, class_names, name="shards")


def _shard_paths(shards: Any) -> list[str]:
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    paths = [path for pattern in map(str, given) for path in (sorted(glob.glob(pattern)) or [pattern])]
    missing = next((path for path in paths if not os.path.isfile(path)), None)
    if missing is not None or not paths:
        raise DataError(f"{missing or 'An empty list'} names no shard; local .tar files are needed.")
    return paths


def _label(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], field: str, where: str) -> str | int:
    if "cls" in members:
        value = _content(archive, members["cls"]).decode().strip()
    elif "json" in members:
        try:
            value = json.loads(_content(archive, members["json"])).get(field)
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
