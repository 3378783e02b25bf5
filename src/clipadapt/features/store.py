"""Features on disk, found again by content: immutable, memory-mapped, checked parts; safe to kill at any time."""

from __future__ import annotations

import os
import time
import uuid
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clipadapt.errors import ClipadaptError
from clipadapt.files import written_aside

KEY_BYTES = 16
PART_ROWS = 4096  # rows that make a part full
PART_SECONDS = 10.0  # work that a kill may cost, at most
SMALL_PART_ROWS = 256  # parts of fewer rows
MAX_SMALL_PARTS = 64  # are joined when there are more than this many


def cache_root() -> Path:
    """Where features are kept by default: $CLIPADAPT_CACHE, or ~/.cache/clipadapt."""
    return Path(os.environ.get("CLIPADAPT_CACHE") or Path.home() / ".cache" / "clipadapt")


def checksum(array: np.ndarray) -> str:
    """CRC-32 of type, shape and bytes of a contiguous array, as 8 hex digits."""
    return f"{zlib.crc32(array.data, zlib.crc32(f'{array.dtype} {array.shape}'.encode())):08x}"


class FeatureStore:
    """Rows of features by 16-byte key, in `folder`; any number of processes may read and write it at once.

    A part is one safetensors file: `keys` (n, 16) uint8, `features` (n, D), and their checksum in its metadata. Parts
    appear by renaming, under unique names, and never change; so readers see whole parts only, and writers cannot
    disturb each other. Used as a context manager it writes what is left on leaving, also after an exception.
    """

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.folder = folder
        self.dtype = np.dtype(dtype)
        self._where: dict[bytes, tuple[_Part, int]] = {}  # key -> part, row
        self._fresh: list[tuple[Sequence[bytes], np.ndarray]] = []  # not on disk yet
        self._fresh_since = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
        except OSError as error:
            raise self._unusable(error) from None
        parts = [part for path in sorted(folder.glob("*.safetensors")) if (part := self._open_part(path))]
        self._join({part for part in parts if len(part.keys) < SMALL_PART_ROWS})

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self.flush()

    def get(self, key: bytes) -> np.ndarray | None:
        """The row (D,) kept under `key`, a read-only view of the file; None if it is missing or damaged."""
        if key not in self._where:
            return None
        part, row = self._where[key]
        if not part.is_sound():
            self._discard(part)
            return None
        return part.features[row]

    def add(self, keys: Sequence[bytes], features: np.ndarray) -> None:
        """Keep rows (n, D) under n keys; they reach the disk when a part is full or `PART_SECONDS` old."""
        self._fresh.append((keys, features.astype(self.dtype)))
        overdue = time.monotonic() - self._fresh_since >= PART_SECONDS
        if overdue or sum(len(keys) for keys, _ in self._fresh) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are not on disk yet, as one part."""
        if self._fresh:
            keys = [key for keys, _ in self._fresh for key in keys]
            features = np.concatenate([features for _, features in self._fresh])
            self._fresh = []
            self._write(keys, features)
        self._fresh_since = time.monotonic()

    def _write(self, keys: list[bytes], features: np.ndarray) -> None:
        key_rows = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        metadata = {"checksum": _joint_checksum(key_rows, features)}
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            with written_aside(path) as aside:
                save_file({"keys": key_rows, "features": features}, aside, metadata)
        except (OSError, SafetensorError) as error:
            raise self._unusable(error) from None
        self._open_part(path)

    def _open_part(self, path: Path) -> _Part | None:
        """The part at `path`, its keys known from now on; None if it is damaged or was joined with others meanwhile."""
        try:
            part = _Part(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}); its images are encoded again.", RuntimeWarning, stacklevel=4)
            path.unlink(missing_ok=True)
            return None
        self._where.update(zip(part.keys, zip(repeat(part), range(len(part.keys))), strict=True))
        return part

    def _discard(self, part: _Part) -> None:
        message = f"{part.path} is damaged; its {len(part.keys)} images are encoded again."
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        part.path.unlink(missing_ok=True)
        self._where = {key: place for key, place in self._where.items() if place[0] is not part}

    def _join(self, small: set[_Part]) -> None:
        """Make one part of many small ones, so that a store fed one image at a time stays fast to open."""
        if len(small) <= MAX_SMALL_PARTS:
            return
        for part in small:
            if not part.is_sound():
                self._discard(part)
        # By key: processes that join at the same time leave copies of each other's rows.
        chosen = [(key, part.features[row]) for key, (part, row) in self._where.items() if part in small]
        if chosen:
            self._write([key for key, _ in chosen], np.stack([row for _, row in chosen]))
        for part in small:
            part.path.unlink(missing_ok=True)

    def _remove_abandoned(self) -> None:
        """Delete files that a killed process left half-written; a living one finishes its own within a day."""
        for path in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):  # its writer has just finished
                if time.time() - path.stat().st_mtime > 86400:
                    path.unlink()

    def _unusable(self, error: Exception) -> ClipadaptError:
        return ClipadaptError(
            f"The feature cache {self.folder} cannot be written ({error}); "
            "set CLIPADAPT_CACHE to a folder with free space, or pass cache=False."
        )


class _Part:
    """One immutable file of a store. Its features are mapped, not read, until a row is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:  # the "np" framework would read the features at once
            self._key_rows = file.get_tensor("keys").numpy()  # (n, 16)
            self.features = file.get_tensor("features").numpy()  # (n, D)
            self._stated = (file.metadata() or {}).get("checksum")
        if self._key_rows.shape != (len(self.features), KEY_BYTES):
            raise ValueError(f"{self._key_rows.shape} keys for {self.features.shape} features")
        self.keys: list[bytes] = self._key_rows.view(f"V{KEY_BYTES}").ravel().tolist()
        self.features.flags.writeable = False
        self._sound: bool | None = None

    def is_sound(self) -> bool:
        """Whether keys and features are what was written; they are read and compared once."""
        if self._sound is None:
            self._sound = _joint_checksum(self._key_rows, self.features) == self._stated
        return self._sound


def _joint_checksum(keys: np.ndarray, features: np.ndarray) -> str:
    return f"{checksum(keys)} {checksum(features)}"
