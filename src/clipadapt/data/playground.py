"""Pictures drawn by our own code, with everything about them known: a world for trying every protocol without any data.

A scene shows one object, several of a kind, or two in a spatial relation; kind, colour, size, texture, place, count and
relation vary, and its style is its domain. Captions, masks and boxes are exact. Scene `index` of a `Playground` depends
on nothing but its seed, the index and what was fixed, so scenes can be drawn in any order, in any process.

    playground = Playground(size=64, kinds=TRAIN_KINDS, styles=TRAIN_STYLES, seed=0)
    image, caption = next(playground.pairs(1))
    data = Playground(kinds=HELDOUT_KINDS, seed=1).dataset(20)    # labelled by kind, styles as domains
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np
from PIL import Image, ImageChops

from clipadapt.data.playground_kinds import SHAPES
from clipadapt.data.playground_styles import COLOURS, STYLES, TEXTURES, Cutout, Style, cut_out, distance
from clipadapt.errors import DataError, unknown_name

if TYPE_CHECKING:
    from clipadapt.data.dataset import Dataset

# Changes whenever the same (seed, index) would give another picture, so that no cached feature outlives its picture.
VERSION = 1

KINDS: tuple[str, ...] = tuple(SHAPES)
TEXTURES_ = TEXTURES
