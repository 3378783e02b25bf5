"""Files and folders: written so that no reader ever sees half of one, and distinguished from foreign ones."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path next to `path` to write to; it replaces `path` at the end, or is deleted on an exception.

    What was written is on the disk before it is renamed, so not even a power cut leaves a part of it under `path`.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def is_model(folder: Path) -> bool:
    """Whether `folder` holds a saved clipadapt model, going by its config.json; other programs write one, too."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"format", "method"} <= config.keys()
