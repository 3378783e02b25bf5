"""Polygons that the playground's shapes are made of, in a plane with x to the right and y down; some whole shapes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple

Point = tuple[float, float]
Tone = Literal["body", "dark", "light", "hole"]


class Part(NamedTuple):
    """A polygon of a shape, painted after those before it."""

    tone: Tone
    points: list[Point]


def oval(x: float, y: float, rx: float, ry: float | None = None, start: float = 0, stop: float = 360) -> list[Point]:
    """Ellipse around (x, y), or its segment between two angles (degrees, clockwise from the right)."""
    ry = rx if ry is None else ry
    steps = max(6, round(abs(stop - start) / 11))
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    """Rectangle between two corners."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def regular(corners: int, turn: float = -90, inner: float | None = None) -> list[Point]:
    """Regular polygon in the unit circle; with `inner`, a star whose notches lie at that radius."""
    radii = [1.0] if inner is None else [1.0, inner]
    count = corners * len(radii)
    turns = [math.radians(turn + 360 * i / count) for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(turns)]


def stroke(points: list[Point], width: float) -> list[Point]:
    """A polyline of the given width as one polygon with mitred corners."""
    headings = [math.atan2(by - ay, bx - ax) for (ax, ay), (bx, by) in pairwise(points)]
    left, right = [], []
    for i, (x, y) in enumerate(points):
        before, after = headings[max(i - 1, 0)], headings[min(i, len(headings) - 1)]
        bend = math.remainder(after - before, math.tau)
        normal, reach = before + bend / 2 + math.pi / 2, width / 2 / max(math.cos(bend / 2), 0.35)
        left.append((x + reach * math.cos(normal), y + reach * math.sin(normal)))
        right.append((x - reach * math.cos(normal), y - reach * math.sin(normal)))
    return left + right[::-1]


def mirror(points: list[Point]) -> list[Point]:
    """The outline closed by its own mirror image at x = 0 (points run from top to bottom)."""
    return points + [(-x, y) for x, y in reversed(points)]


def heart() -> list[Point]:
    """Outline of a heart in the unit circle."""
    turns = [math.tau * i / 40 for i in range(40)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in turns
    ]


def spiral() -> list[Point]:
    """Outline of a spiral line in the unit circle."""
    turns = [math.tau * (0.25 + 2.25 * i / 60) for i in range(61)]
    return stroke([(t / 16 * math.cos(t), t / 16 * math.sin(t)) for t in turns], 0.17)


def crescent() -> list[Point]:
    """Outline of a crescent moon in the unit circle."""
    return oval(0, 0, 1, 1, 50, 310) + oval(0.42, 0, 0.8, 0.8, 285, 75)


def sun() -> tuple[Part, ...]:
    """A disk with eight rays."""
    rays = []
    for i in range(8):
        a = math.tau * i / 8
        corners = [(1.0, a), (0.62, a + 0.24), (0.62, a - 0.24)]
        rays.append(Part("body", [(r * math.cos(t), r * math.sin(t)) for r, t in corners]))
    return (*rays, Part("body", oval(0, 0, 0.52)))


def flower() -> tuple[Part, ...]:
    """Six petals around a disk."""
    petals = []
    for i in range(6):
        a = math.tau * (i + 0.5) / 6
        petals.append(Part("body", oval(0.3 * math.cos(a), -0.42 + 0.3 * math.sin(a), 0.22)))
    stem = Part("dark", box(-0.045, -0.1, 0.045, 1))
    leaves = [Part("dark", oval(s * 0.24, 0.62, 0.22, 0.11)) for s in (-1, 1)]
    return (stem, *leaves, *petals, Part("light", oval(0, -0.42, 0.17)))


def snail() -> tuple[Part, ...]:
    """A snail with a spiral shell."""
    turns = [math.tau * i / 30 for i in range(51)]
    whorl = [(0.12 + t / 30 * math.cos(t), -0.12 + t / 30 * math.sin(t)) for t in turns]
    return (
        Part("dark", [(-0.95, 0.25), (-0.62, 0.2), (-0.45, 0.5), (1.0, 0.62), (0.9, 0.72), (-0.7, 0.72), (-0.95, 0.5)]),
        Part("dark", stroke([(-0.85, 0.3), (-1.0, -0.2)], 0.09)),
        Part("dark", stroke([(-0.72, 0.3), (-0.68, -0.2)], 0.09)),
        Part("body", oval(0.12, -0.02, 0.62)),
        Part("light", stroke(whorl, 0.09)),
    )


def gear() -> tuple[Part, ...]:
    """A gear wheel with eight teeth."""
    teeth = []
    for i in range(8):
        for radius, offset in ((0.74, -0.3), (1.0, -0.2), (1.0, 0.2), (0.74, 0.3)):
            a = math.tau * (i + offset) / 8
            teeth.append((radius * math.cos(a), radius * math.sin(a)))
    return (Part("body", teeth), Part("hole", oval(0, 0, 0.32)))
