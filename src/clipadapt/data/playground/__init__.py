"""A playground that draws its own labelled images."""

from clipadapt.data.playground.drawing import (
    COLOURS,
    HELDOUT_KINDS,
    HELDOUT_STYLE,
    KINDS,
    SIZES,
    STYLES,
    TEXTURES,
    TRAIN_KINDS,
    TRAIN_STYLES,
    VERSION,
    Obj,
    Playground,
    Scene,
)

__all__ = [
    "COLOURS",
    "HELDOUT_KINDS",
    "HELDOUT_STYLE",
    "KINDS",
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
