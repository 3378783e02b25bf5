"""What a scene of the playground shows: its objects, where they are, and the captions that are true of them.

Each of `single`, `several`, `two` and `each` draws plans of objects and several true captions; `kinds` are those that
may occur, and what is None is drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clipadapt.data.playground.polygons import Point
from clipadapt.data.playground.styles import COLOURS, TEXTURES, distance
from clipadapt.errors import DataError

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}

# Each relation with its words, and the words for it when the two objects are named the other way round.
RELATIONS = {
    "left of": ("to the left of", "to the right of"),
    "right of": ("to the right of", "to the left of"),
    "above": ("above", "below"),
    "below": ("below", "above"),
    "inside": ("inside", "around"),
}
CONTAINERS = ("circle", "square", "hexagon", "diamond", "heart", "ring")  # what another object can be inside of

# Extent of an object's larger side, as a share of the image's.
SIZES = {"small": (0.28, 0.35), "medium": (0.44, 0.56), "large": (0.76, 0.92)}
_SMALL_BELOW, _LARGE_FROM = 0.36, 0.66

# Where a single object is: its words, and the direction from the middle.
_PLACES: dict[str, Point] = {
    "in the middle": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
MOST_KINDS = 9  # that a scene has room for
_PLURALS = {"butterfly": "butterflies", "fish": "fish", "leaf": "leaves"}


class Plan(NamedTuple):
    """An object to be drawn; centre and extent are shares of the image's side."""

    kind: str
    colour: str
    texture: str
    centre: Point
    extent: float


def single(
    rng: np.random.Generator, kinds: Sequence[str], kind: str | None, colour: str | None, texture: str | None
) -> tuple[list[Plan], list[str]]:
    """One object, anywhere if it is not large."""
    kind, colour = kind or pick(rng, kinds), colour or pick(rng, COLOURS)
    texture = texture or (pick(rng, TEXTURES) if rng.random() < 0.4 else "plain")
    size = pick(rng, ["small", "medium", "large", "large"] if texture == "plain" else ["medium", "large"])
    extent = rng.uniform(*SIZES[size])
    place = "in the middle" if size == "large" else pick(rng, _PLACES)
    reach = {"small": 0.29, "medium": 0.2, "large": 0.0}[size]
    x, y = (0.5 + reach * direction for direction in _PLACES[place])
    plan = Plan(kind, colour, texture, _jitter(rng, x, y), extent)
    captions = [_a(kind), _a(colour, kind), _a(colour, kind), f"{_a(colour, kind)} {place}"]
    words = [size] if size != "medium" else []
    words += [texture] if texture != "plain" else []
    if words:
        captions += [_a(*words, kind), _a(*words, colour, kind)]
    return [plan], list(dict.fromkeys(captions))


def several(
    rng: np.random.Generator,
    kinds: Sequence[str],
    kind: str | None,
    colour: str | None,
    texture: str | None,
    count: str | None,
) -> tuple[list[Plan], list[str]]:
    """Several objects that are alike, in cells of a grid."""
    kind, colour = kind or pick(rng, kinds), colour or pick(rng, COLOURS)
    count = count or pick(rng, list(COUNTS)[1:])
    cells = rng.permutation(9)[: COUNTS[count]]  # of a 3 x 3 grid; equal sizes, so that only counting tells
    plans = [
        Plan(
            kind,
            colour,
            texture or "plain",
            _jitter(rng, 0.18 + 0.32 * (cell % 3), 0.18 + 0.32 * (cell // 3)),
            rng.uniform(0.25, 0.28),
        )
        for cell in cells.tolist()
    ]
    if count == "one":
        return plans, [_a(kind), _a(colour, kind)]
    plural = _PLURALS.get(kind) or kind + ("es" if kind.endswith("s") else "s")
    return plans, [f"{count} {plural}", f"{count} {colour} {plural}"]


def two(
    rng: np.random.Generator,
    kinds: Sequence[str],
    kind: str | None,
    colour: str | None,
    texture: str | None,
    relation: str | None,
) -> tuple[list[Plan], list[str], str]:
    """Two objects of different kinds and colours in a relation, which comes third."""
    if relation is None:
        contains = any(name in CONTAINERS for name in kinds)
        relation = pick(rng, [name for name in RELATIONS if contains or name != "inside"])
    other = pick(rng, partners(kinds, relation, kind))
    kind = kind or pick(rng, [name for name in kinds if name != other])
    colour = colour or pick(rng, COLOURS)
    contrasting = [name for name, paint in COLOURS.items() if distance(paint, COLOURS[colour]) >= 180]
    other_colour = pick(rng, contrasting)
    if relation == "inside":
        places = [(0.5, 0.5), (0.5, 0.5)]
        extents = [rng.uniform(0.26, 0.32), rng.uniform(0.82, 0.92)]
    else:
        near, far = (0.27, 0.73) if relation in ("left of", "above") else (0.73, 0.27)
        drift = [0.5 + rng.uniform(-0.12, 0.12) for _ in range(2)]
        places = [(near, drift[0]), (far, drift[1])]
        if relation in ("above", "below"):
            places = [(y, x) for x, y in places]
        extents = [rng.uniform(0.37, 0.42) for _ in range(2)]
    first = Plan(kind, colour, texture or "plain", _jitter(rng, *places[0]), extents[0])
    second = Plan(other, other_colour, "plain", _jitter(rng, *places[1]), extents[1])
    words, converse = RELATIONS[relation]
    captions = [f"{_a(colour, kind)} and {_a(other_colour, other)}", f"{_a(kind)} and {_a(other)}"]
    for a, b in ((_a(colour, kind), _a(other_colour, other)), (_a(kind), _a(other))):
        captions += [f"{a} {words} {b}", f"{b} {converse} {a}"]
        if relation in ("left of", "right of"):
            captions += [f"{a} next to {b}", f"{b} next to {a}"]
    return [first, second], captions, relation


def each(rng: np.random.Generator, kinds: Sequence[str]) -> tuple[list[Plan], list[str]]:
    """One plain object of each kind, in cells of a grid, so that none touches another."""
    side, extent = (2, (0.34, 0.42)) if len(kinds) <= 4 else (3, (0.22, 0.28))
    first, step = (0.27, 0.46) if side == 2 else (0.18, 0.32)
    plans = [
        Plan(
            kind,
            pick(rng, COLOURS),
            "plain",
            _jitter(rng, first + step * (cell % side), first + step * (cell // side)),
            rng.uniform(*extent),
        )
        for kind, cell in zip(kinds, rng.permutation(side * side).tolist(), strict=False)
    ]
    return plans, [
        _enumerate([_a(plan.colour, plan.kind) for plan in plans]),
        _enumerate([_a(plan.kind) for plan in plans]),
    ]


def partners(kinds: Sequence[str], relation: str, kind: str | None = None) -> list[str]:
    """The kinds that the second object of a relation can be of; `kind` is the first one's, None if it is open."""
    fitting = CONTAINERS if relation == "inside" else kinds
    found = [name for name in kinds if name in fitting and name != kind]
    if not found or (kind is None and len(kinds) < 2):
        among = f", the second among {', '.join(CONTAINERS)}" if relation == "inside" else ""
        raise DataError(f"The relation {relation!r} needs two different kinds{among}.")
    return found


def size_word(extent: float) -> str:
    """The word for an extent: small, medium or large."""
    return "small" if extent < _SMALL_BELOW else "medium" if extent < _LARGE_FROM else "large"


def pick(rng: np.random.Generator, choices: Iterable[str]) -> str:
    """One of the choices, each equally likely."""
    options = list(choices)
    return options[int(rng.integers(len(options)))]


def _jitter(rng: np.random.Generator, x: float, y: float) -> Point:
    return x + rng.uniform(-0.015, 0.015), y + rng.uniform(-0.015, 0.015)


def _a(*words: str) -> str:
    """The words as a noun phrase with its article."""
    return " ".join((("an" if words[0][0] in "aeiou" else "a"), *words))


def _enumerate(phrases: Sequence[str]) -> str:
    """The phrases as a list in words: "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
