"""Playground images of single things with one visual factor changed at a time, or with conflicting cues.

In photographs the surface of a thing correlates with what it is. Here each kind has its own cloth, a colour and a
texture; a plain image shows a kind in its cloth, upright, in the middle, of middle size, in one of three styles, on
one of the style's papers. Image i of a kind under a factor is its plain image i with that changed and nothing else,
except that the paper changes where a new colour would not stand out from it. In a cue-conflict image the shape is of
one kind and the cloth of another, after Geirhos et al., "ImageNet-trained CNNs are biased towards texture" (arXiv
1811.12231).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from clipadapt.data.examples import Dataset
from clipadapt.data.items import GeneratedItem, Item
from clipadapt.data.playground.drawing import KINDS
from clipadapt.data.playground.drawing import VERSION as PLAYGROUND_VERSION
from clipadapt.data.playground.polygons import Point
from clipadapt.data.playground.styles import COLOURS, STYLES, TEXTURES, cut_out, distance
from clipadapt.errors import DataError, unknown_name
from clipadapt.renamed import old_names

VERSION = 1  # raise it when an image changes, so that no cached feature outlives its image
STYLES_SHOWN = ("flat", "watercolour", "chalk")  # of plain images


class Look(NamedTuple):
    """All choices about an image; lengths are fractions of its side."""

    kind: str
    colour: str
    texture: str
    style: str
    extent: float  # of the larger side
    centre: Point
    turn: float  # degrees
    stretch: float  # sideways; negative mirrors
    light: float = 1.0  # factor on the final pixels
    backdrop: tuple[str, str, str] | None = None  # texture and its two colours, instead of the style's paper
    block: Point | None = None  # middle of a grey disk that covers the thing


def draw(look: Look, size: int, seeds: Sequence[int]) -> Image.Image:
    """The image, `size` pixels square; what a style leaves to chance depends on `seeds`."""
    rng, canvas = np.random.default_rng(seeds), 2 * size
    centre = (look.centre[0] * canvas, look.centre[1] * canvas)
    cut = cut_out(
        look.kind, COLOURS[look.colour], look.texture, centre, look.extent * canvas, look.turn, look.stretch, canvas
    )
    style = STYLES[look.style]
    if look.backdrop is None:
        image = style.render([cut], canvas, rng)
    else:
        texture, first, second = look.backdrop
        image = Image.new("RGB", (canvas, canvas), COLOURS[first])
        pattern = TEXTURES[texture]
        if pattern is not None:
            image.paste(COLOURS[second], (0, 0), pattern(image.size, canvas / 100))
        style.paint(image, cut, rng)
        image = image.reduce(2)
    if look.block is not None:
        x, y = (place * canvas for place in look.block)
        mask, reach = Image.new("L", (canvas, canvas)), 0.14 * canvas
        ImageDraw.Draw(mask).ellipse([x - reach, y - reach, x + reach, y + reach], fill=255)
        image.paste((98, 98, 106), (0, 0), mask.reduce(2))
    return image.point([round(value * look.light) for value in range(256)] * 3) if look.light != 1 else image


def cloths(kinds: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The (colour, texture) that each of the kinds has, independent of the order of the kinds."""
    every = [(colour, texture) for colour in COLOURS for texture in TEXTURES]
    if len(kinds) > len(every):
        raise DataError(f"There are only {len(every)} cloths for {len(kinds)} kinds.")
    order = np.random.default_rng(0).permutation(len(every))
    return {kind: every[order[i]] for i, kind in enumerate(sorted(kinds))}


# -- factors: what is changed of a plain image -----------------------------------------------------------------------


def _other(rng: np.random.Generator, choices: Sequence[str], own: str) -> str:
    options = [name for name in choices if name != own]
    return options[int(rng.integers(len(options)))]


def _move(look: Look, reach: float, angle: float) -> Look:
    x, y = look.centre
    return look._replace(centre=(x + reach * math.cos(angle), y + reach * math.sin(angle)))


def _background(look: Look, rng: np.random.Generator) -> Look:
    """Two colours in a texture, neither like the thing's own."""
    apart = [name for name, rgb in COLOURS.items() if distance(rgb, COLOURS[look.colour]) >= 180]
    first, second = (apart[i] for i in rng.permutation(len(apart))[:2].tolist())
    return look._replace(backdrop=(_other(rng, list(TEXTURES), "plain"), first, second))


def _block(look: Look, rng: np.random.Generator) -> Look:
    angle = rng.uniform(0, 2 * math.pi)
    return look._replace(block=_move(look, 0.12, angle).centre)


FACTORS: dict[str, Callable[[Look, np.random.Generator], Look]] = {
    "style": lambda look, rng: look._replace(style=_other(rng, [s for s in STYLES if s not in STYLES_SHOWN], "")),
    "colour": lambda look, rng: look._replace(colour=_other(rng, list(COLOURS), look.colour)),
    "texture": lambda look, rng: look._replace(texture=_other(rng, list(TEXTURES), look.texture)),
    "smaller": lambda look, rng: look._replace(extent=rng.uniform(0.26, 0.32)),
    "larger": lambda look, rng: look._replace(extent=rng.uniform(0.92, 1.0)),
    "position": lambda look, rng: _move(look, 0.15, math.pi / 4 * int(rng.integers(8))),
    "rotation": lambda look, rng: look._replace(turn=rng.uniform(60, 300)),
    "partial view": lambda look, rng: _move(look, 0.42, math.pi / 2 * int(rng.integers(4))),
    "background": _background,
    "darker": lambda look, rng: look._replace(light=rng.uniform(0.25, 0.4)),
    "blocked": _block,
}

# -- data sets -------------------------------------------------------------------------------------------------------


def factor_images(
    kinds: Sequence[str],
    n_per_class: int,
    factor: str | None = None,
    *,
    typical: float = 1.0,
    seed: int = 0,
    size: int = 64,
) -> Dataset:
    """Images labelled by kind, plain or with one of the `FACTORS` changed; drawn when they are opened.

    `typical` is the share of images in which a kind wears its own cloth; in the others colour and texture are random.
    """
    if factor is not None and factor not in FACTORS:
        raise unknown_name("playground factor", factor, list(FACTORS))
    own = cloths(kinds)
    items: list[Item] = []
    for kind in kinds:
        for i in range(n_per_class):
            look = _plain(kind, own[kind], typical, seed, i)
            if factor is not None:
                look = FACTORS[factor](look, np.random.default_rng([seed, KINDS.index(kind), i, 1]))
            items.append(_item(look, size, seed, i))
    labels = [label for label in range(len(kinds)) for _ in range(n_per_class)]
    return Dataset(items, labels, list(kinds), name=f"playground, {factor or 'plain'}")


def cue_conflicts(
    kinds: Sequence[str], n_per_class: int, *, seed: int = 0, size: int = 64
) -> tuple[Dataset, np.ndarray]:
    """(images labelled by the kind of their shape, (N,) labels of the kind whose cloth it wears, never the same)."""
    own, items, worn = cloths(kinds), list[Item](), []
    for label, kind in enumerate(kinds):
        for i in range(n_per_class):
            worn.append((label + 1 + i % (len(kinds) - 1)) % len(kinds))
            items.append(_item(_plain(kind, own[kinds[worn[-1]]], 1.0, seed, i), size, seed, i))
    labels = [label for label in range(len(kinds)) for _ in range(n_per_class)]
    return Dataset(items, labels, list(kinds), name="playground, cues in conflict"), np.array(worn)


def unknown_kinds(kinds: Sequence[str], n: int, *, seed: int = 0, size: int = 64) -> list[Item]:
    """`n` plain images of the playground's other kinds, in the cloths of `kinds`: only their shape is new."""
    others = [kind for kind in KINDS if kind not in kinds]
    if not others:
        raise DataError("All kinds of the playground are known; leave some out to have unknown ones.")
    worn = list(cloths(kinds).values())
    return [_item(_plain(others[i % len(others)], worn[i % len(worn)], 1.0, seed, i), size, seed, i) for i in range(n)]


def _plain(kind: str, cloth: tuple[str, str], typical: float, seed: int, i: int) -> Look:
    rng = np.random.default_rng([seed, KINDS.index(kind), i, 0])
    other = (_other(rng, list(COLOURS), ""), _other(rng, list(TEXTURES), ""))
    colour, texture = cloth if rng.random() < typical else other
    style, mirrored = STYLES_SHOWN[i % len(STYLES_SHOWN)], rng.random() < 0.5
    return Look(
        kind,
        colour,
        texture,
        style,
        extent=rng.uniform(0.58, 0.66),
        centre=(0.5 + rng.uniform(-0.03, 0.03), 0.5 + rng.uniform(-0.03, 0.03)),
        turn=rng.uniform(-9, 9),
        stretch=rng.uniform(0.93, 1.07) * (-1 if mirrored else 1),
    )


def _item(look: Look, size: int, seed: int, i: int) -> Item:
    seeds = (seed, KINDS.index(look.kind), i, 2)
    key = f"playground factors {VERSION} {PLAYGROUND_VERSION} {look} {size} {seeds}"
    return GeneratedItem(
        f"playground-factors-{seed}/{look.style}/{look.kind}/{i}", key, partial(draw, look, size, seeds)
    )


__getattr__ = old_names(__name__)
