"""From the name of an embedded image back to the image."""

from __future__ import annotations

import os
import tarfile
from functools import lru_cache

from clipadapt.data import EncodedItem, FileItem
from clipadapt.embeddings.remote import RemoteItem, is_url
from clipadapt.errors import DataError
from clipadapt.renamed import old_names


def named_image(name: str) -> EncodedItem:
    """The image that embeddings call `name`: a path, a URL, or "shard.tar:member".

    Raises:
        DataError: the tar file cannot be read or has no such member; other failures come when the item is opened.
    """
    if is_url(name):
        return RemoteItem(name)
    shard, colon, member = name.partition(".tar:")
    if not colon or os.path.exists(name):
        return FileItem(name)
    shard += ".tar"
    try:
        places = _members(shard, os.stat(shard).st_mtime_ns)
        start, length = places[member]
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{name} cannot be read: {error}.") from None
    except KeyError:
        raise DataError(f"{shard} no longer has a member {member}.") from None
    return FileItem(shard, start, length, name)


@lru_cache(maxsize=8)
def _members(shard: str, changed: int) -> dict[str, tuple[int, int]]:
    """(first byte, bytes) of each member; `changed` makes a rewritten file another one."""
    with tarfile.open(shard, "r:") as archive:
        return {member.name: (member.offset_data, member.size) for member in archive if member.isfile()}


__getattr__ = old_names(__name__)
