"""The fifteen common corruptions in five severities, and data sets whose images are corrupted when they are opened.

Definitions and parameters are those of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (arXiv 1903.12261), read in the code that made ImageNet-C (hendrycks/robustness). This is
code for numpy, scipy and Pillow. At 224 pixels, the size of ImageNet-C, `PARAMETERS` hold unchanged; at
any other size s = shorter side / 224 and

    noise, brightness, contrast, zoom, pixelate, jpeg   as published: they know shares and single pixels, not lengths
    defocus, motion                                     the published kernel, shrunk or enlarged by s
    snow, frost, fog, elastic                           drawn for a shorter side of 224, then resized to the image
    glass                                               below 224 pixels on the image enlarged to 224, and back;
                                                        above, lengths times s

Sides are compared after `size`, if one is given: `corrupted(..., size=224)` shrinks larger images first, as
ImageNet-C did (its crop is left to the model's own preprocessing).

What differs from ImageNet-C: its images were kept as JPEG of quality 85, these are not; its random numbers come from
another generator. Frost there is photographs of ice, which cannot be shipped; here it is drawn needles of ice, whose
brightness, contrast and tint come from the ranges that those photographs span. Glass blur keeps what the published loop
does: each pixel is overwritten by a near one, and what it held is lost, since its swap of array views has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from clipadapt.data.corruptions.effects import EFFECTS, to_image
from clipadapt.data.examples import Labelled
from clipadapt.data.items import Item, hash_bytes, to_rgb
from clipadapt.errors import DataError, unknown_name

VERSION = 1  # raise it when a corruption changes, so that no cached feature outlives its image

_ELASTIC = 244  # as published; its comment says that 224 was meant

# The published parameters at severities 1 to 5.
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "gaussian-noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # deviation
    "shot-noise": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse-noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of values
    "defocus-blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius, deviation of its soft edge
    "glass-blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),  # deviation, reach, times
    "motion-blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # radius, deviation
    "zoom-blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),  # end, step
    "snow": (  # mean, deviation, zoom, threshold, radius, deviation of the fall, share of the image
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),  # factors of the image, of the ice
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # thickness, decay from scale to scale
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of HSV
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor
    "elastic": tuple(  # strength and deviation of the field, reach of the affine map
        tuple(_ELASTIC * share for share in shares)
        for shares in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of each side
    "jpeg": (25, 18, 15, 10, 7),  # quality
}
KINDS = tuple(PARAMETERS)
GROUPS = {"noise": KINDS[:3], "blur": KINDS[3:7], "weather": KINDS[7:11], "digital": KINDS[11:]}
SEVERITIES = (1, 2, 3, 4, 5)

Data = TypeVar("Data", bound=Labelled[Any])


def corrupt(image: Image.Image, kind: str, severity: int, seed: int | Sequence[int] = 0) -> Image.Image:
    """A corrupted RGB image of the same size; equal arguments give equal images.

    Args:
        image: of any size; it is turned upright and made RGB first.
        kind: one of `KINDS`.
        severity: 1 to 5.
        seed: not negative. All severities of a kind share their random numbers, so they differ in strength alone.

    Raises:
        ClipadaptError: kind or severity is not known, or the seed is negative.
    """
    _check(kind, severity)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    if min(seeds) < 0:
        raise DataError(f"The seed of a corruption must be at least 0, not {seed}.")
    rng = np.random.default_rng([*seeds, KINDS.index(kind)])
    x = np.asarray(to_rgb(image)) / 255
    return to_image(EFFECTS[kind](x, PARAMETERS[kind][severity - 1], rng))


def kinds_of(names: str | Sequence[str]) -> tuple[str, ...]:
    """The kinds meant by "all", by the name of a group or kind, or by several of these; each once, in order."""
    known = {"all": KINDS, **GROUPS, **{kind: (kind,) for kind in KINDS}}
    wanted: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise unknown_name("corruption", str(name), list(known))
        wanted += known[name]
    return tuple(dict.fromkeys(wanted))


@dataclass(frozen=True)
class CorruptedItem(Item):
    """An image that is corrupted when it is opened; what is drawn depends on the seed and on the image's content."""

    item: Item = field(repr=False)
    kind: str
    severity: int
    seed: int
    size: int | None = None  # an image whose shorter side is larger is shrunk to it first

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.item.name} under {self.kind} {self.severity}"

    def open(self) -> Image.Image:
        image = self.item.open()
        if self.size is not None and min(image.size) > self.size:
            short = min(image.size)
            sides = [max(1, round(side * self.size / short)) for side in image.size]
            image = image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
        return corrupt(image, self.kind, self.severity, [self.seed, int(self.item.digest()[:16], 16)])

    def digest(self) -> str:
        what = f"corrupted {VERSION} {self.kind} {self.severity} {self.seed} {self.size} {self.item.digest()}"
        return hash_bytes(what.encode())


def corrupted(data: Data, kind: str, severity: int, seed: int = 0, *, size: int | None = None) -> Data:
    """The same data set with each image corrupted when it is opened.

    `size`: images whose shorter side is larger are shrunk to it first (bicubic), so that what the model sees has the
    published strength; noise on a large photo would be averaged away when the model's preprocessing shrinks it.
    """
    _check(kind, severity)
    if seed < 0 or (size is not None and size < 1):
        raise DataError("corrupted needs a seed of at least 0 and a size of at least 1.")
    items: list[Item] = [CorruptedItem(item, kind, severity, seed, size) for item in data.items]
    return replace(data, items=items, name=f"{data.name} under {kind} {severity}")


def _check(kind: str, severity: int) -> None:
    if kind not in KINDS:
        raise unknown_name("corruption", kind, KINDS)
    if severity not in SEVERITIES:
        raise DataError(f"The severity of a corruption must be 1 to 5, not {severity}.")
