"""A store's folder: several files that belong together and are replaced together."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipadapt.errors import ArtifactError
from clipadapt.files import written_aside

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1  # raised when an older version of the library could not read the folder any more


def read(folder: Path, kind: str, dim: int) -> dict[str, Any] | None:
    """What `store.json` of the folder says; None if nothing was kept yet.

    Raises `ArtifactError` if it is damaged, newer than this version, or of another kind or width.
    """
    path = folder / "store.json"
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; the {kind} store is a folder.")
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, files = int(state["format"]), state["files"]
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path} is damaged; delete {folder} and index again.") from None
    if version > FORMAT:
        raise ArtifactError(
            f"{path} has format {version}; this version reads formats up to {FORMAT}: upgrade clipadapt."
        )
    if state.get("kind") != kind:
        raise ArtifactError(f"{folder} holds a store of the kind {state.get('kind')!r}, not {kind!r}.")
    if state.get("dim") != dim:
        raise ArtifactError(f"{folder} holds vectors of width {state.get('dim')}, not {dim}.")
    for name in files.values():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} is incomplete: {name} is missing; delete it and index again.")
    return state


def write(
    folder: Path, kind: str, dim: int, of: list[Any] | None, files: Mapping[str, Callable[[Path], None]]
) -> dict[str, Any]:
    """Replace what the folder holds; a reader sees the older files or the newer ones, never a mixture.

    Args:
        of: what the store belongs to, kept as it is.
        files: by name ("ids.npy"), what writes the file to a path. It gets a unique name ("ids-1f….npy").

    Returns:
        The new state, as `read` gives it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:12]
    names = {name: f"{Path(name).stem}-{token}{Path(name).suffix}" for name in files}
    for name, write_to in files.items():
        with written_aside(folder / names[name]) as aside:
            write_to(aside)
    state = {"format": FORMAT, "kind": kind, "dim": dim, "of": of, "files": names}
    before = _files(folder)
    with written_aside(folder / "store.json") as aside:
        aside.write_text(json.dumps(state), encoding="utf-8")
    for stale in before - set(names.values()):
        (folder / stale).unlink(missing_ok=True)
    return state


def _files(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / "store.json").read_text(encoding="utf-8"))["files"].values())
    except (OSError, ValueError, KeyError):
        return set()


def save_array(array: np.ndarray) -> Callable[[Path], None]:
    """Writes an array as .npy, regardless of the path's suffix."""

    def write_to(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    return write_to


def load_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """An .npy file, mapped if so asked; raises `ArtifactError` if it is damaged."""
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete {path.parent} and index again.") from None


def save_table(table: pyarrow.Table) -> Callable[[Path], None]:
    """Writes a table as Parquet."""

    def write_to(path: Path) -> None:
        from pyarrow import parquet

        parquet.write_table(table, path)

    return write_to


def load_table(path: Path) -> pyarrow.Table:
    """A Parquet file; raises `ArtifactError` if it is damaged."""
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path)
    except (OSError, ArrowException) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete {path.parent} and index again.") from None
