"""Fifteen corruptions of images, in five strengths each."""

from clipadapt.data.corruptions.kinds import (
    GROUPS,
    KINDS,
    PARAMETERS,
    SEVERITIES,
    CorruptedItem,
    corrupt,
    corrupted,
    kinds_of,
)

__all__ = ["GROUPS", "KINDS", "PARAMETERS", "SEVERITIES", "CorruptedItem", "corrupt", "corrupted", "kinds_of"]
