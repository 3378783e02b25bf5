"""A playground that draws its own labelled images."""

from clipadapt.data.playground.composition import CONTAINERS, COUNTS, RELATIONS, SIZES
from clipadapt.data.playground.drawing import (
    HELDOUT_KINDS,
    HELDOUT_STYLE,
    KINDS,
    TRAIN_KINDS,
    TRAIN_STYLES,
    VERSION,
    Obj,
    Playground,
    Scene,
)
from clipadapt.data.playground.styles import COLOURS, STYLES, TEXTURES

__all__ = [
    "COLOURS",
    "CONTAINERS",
    "COUNTS",
    "HELDOUT_KINDS",
    "HELDOUT_STYLE",
    "KINDS",
    "RELATIONS",
    "SIZES",
    "STYLES",
    "TEXTURES",
    "TRAIN_KINDS",
    "TRAIN_STYLES",
    "VERSION",
    "Obj",
    "Playground",
    "Scene",
]
