"""Files behind URLs (s3://, gs://, https://, memory://, …) by fsspec, and the same calls for local paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clipadapt.data import BytesItem, EncodedItem
from clipadapt.errors import ClipadaptError, DataError


def is_url(path: str | Path) -> bool:
    """Whether `path` is for fsspec; file:// counts."""
    return "://" in str(path)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it.

    Raises:
        ClipadaptError: fsspec, or what it needs for this kind of URL, is not installed; or the kind is unknown.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ClipadaptError('URLs need an extra: pip install "clipadapt[search]".') from None
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ClipadaptError(f"{url} cannot be opened: {str(error).rstrip('.')}.") from None


@dataclass(frozen=True)
class RemoteItem(EncodedItem):
    """An image behind a URL; encoding transfers it once."""

    url: str

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.url

    def read(self) -> bytes:
        system, path = file_system(self.url)
        with _plain_errors(self.url):
            return system.cat_file(path)

    def fetched(self) -> BytesItem:
        return BytesItem(self.url, self.read())


def join(folder: str, name: str) -> str:
    """The path or URL of `name` in `folder`; a `name` that is absolute, or a URL, is taken as it is."""
    if is_url(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """The folder that a file's path or URL is in."""
    return path.rsplit("/", 1)[0] if is_url(path) else os.path.dirname(path)


@contextmanager
def open_path(path: str) -> Iterator[IO[bytes]]:
    """A path or URL to read bytes from; raises DataError naming it if that is impossible."""
    with ExitStack() as stack:
        with _plain_errors(path):
            if is_url(path):
                system, place = file_system(path)
                file = stack.enter_context(system.open(place, "rb"))
            else:
                file = stack.enter_context(open(path, "rb"))
        yield file


def read_text(path: str) -> str | None:
    """The content of a UTF-8 file, or None if there is no such file."""
    if not is_url(path):
        return Path(path).read_text(encoding="utf-8") if os.path.isfile(path) else None
    system, place = file_system(path)
    with _plain_errors(path):
        try:
            return system.cat_file(place).decode()
        except FileNotFoundError:
            return None


def names_in(folder: str) -> list[str]:
    """The names of the files in a folder, unsorted; none if the folder does not exist."""
    if not is_url(folder):
        return os.listdir(folder) if os.path.isdir(folder) else []
    system, place = file_system(folder)
    system.invalidate_cache()
    with _plain_errors(folder):
        try:
            return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in system.ls(place, detail=False)]
        except FileNotFoundError:
            return []


def files_below(url: str) -> tuple[str, list[str]]:
    """(the folder's URL, the URLs of all files in it and below, sorted); both begin alike."""
    system, place = file_system(url)
    with _plain_errors(url):
        found = system.find(place)
    return system.unstrip_protocol(place), sorted(map(system.unstrip_protocol, found))


def matching(pattern: str) -> list[tuple[str, int | None]]:
    """(URL, bytes) of the files that a URL with wildcards matches, sorted."""
    system, place = file_system(pattern)
    with _plain_errors(pattern):
        found = system.glob(place, detail=True)
    return [(system.unstrip_protocol(path), found[path].get("size")) for path in sorted(found)]


def upload(files: Sequence[Path], folder: str) -> None:
    """Copy local files into the folder at a URL, one after another in the order given."""
    system, place = file_system(folder)
    with _plain_errors(folder):
        system.makedirs(place, exist_ok=True)
        for file in files:
            system.put_file(str(file), f"{place.rstrip('/')}/{file.name}")


def download(url: str, file: Path) -> None:
    """Copy what is at a URL into a local file, which no one else may be reading yet."""
    system, place = file_system(url)
    with _plain_errors(url):
        system.get_file(place, str(file))


@contextmanager
def _plain_errors(path: str) -> Iterator[None]:
    """Turn the errors of the various file systems into a sentence that names the path."""
    try:
        yield
    except (ClipadaptError, KeyboardInterrupt):
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise DataError(f"{path} cannot be reached: {str(reason).rstrip('.')}.") from None
