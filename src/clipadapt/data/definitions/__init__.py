"""Data sets by name: what they are called, where their files are, and how they are split."""

from clipadapt.data.definitions.definition import (
    DATA,
    Definition,
    Loaded,
    check,
    definition,
    definitions,
    load,
    read_yaml,
)

__all__ = ["DATA", "Definition", "Loaded", "check", "definition", "definitions", "load", "read_yaml"]
