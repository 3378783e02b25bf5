"""What clipadapt raises for bad input: one sentence that names the file, row or argument and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClipadaptError(Exception):
    """Base of every error a user can cause; its message is one sentence for the user."""


class DataError(ClipadaptError):
    """An image, table, split file or folder cannot be used."""


class BackboneError(ClipadaptError):
    """A pretrained model cannot be loaded, or lacks what was asked of it."""


class ArtifactError(ClipadaptError):
    """A saved model is missing, damaged, newer than this version, or was made on another backbone."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ClipadaptError:
    """The error for a `kind` called `name` that is not among `known`; it lists the nearest known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return ClipadaptError(f"Unknown {kind} {name!r}; did you mean {' or '.join(map(repr, near))}?")
    return ClipadaptError(f"Unknown {kind} {name!r}; known are: {', '.join(names)}.")
