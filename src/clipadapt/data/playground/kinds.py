"""The shapes of the playground's object kinds, as polygons.

A shape is a tuple of parts; position and scale do not matter, because `styles.cut_out` fits every shape into the box
it is given. Parts are painted in order: `body` in the object's colour and texture, then `dark` and `light` details in
tones of the same colour; a `hole` cuts through everything before it.
"""

from __future__ import annotations

import math

from clipadapt.data.playground.polygons import (
    Part,
    Point,
    box,
    crescent,
    flower,
    gear,
    heart,
    mirror,
    oval,
    regular,
    snail,
    spiral,
    stroke,
    sun,
)


def _one(points: list[Point]) -> tuple[Part, ...]:
    return (Part("body", points),)


SHAPES: dict[str, tuple[Part, ...]] = {
    "circle": _one(oval(0, 0, 1)),
    "square": _one(box(-1, -1, 1, 1)),
    "rectangle": _one(box(-1, -0.5, 1, 0.5)),
    "triangle": _one([(0, -0.9), (1, 0.85), (-1, 0.85)]),
    "diamond": _one([(0, -1), (0.78, 0), (0, 1), (-0.78, 0)]),
    "hexagon": _one(regular(6, turn=0)),
    "oval": _one(oval(0, 0, 1, 0.6)),
    "semicircle": _one(oval(0, 0, 1, 1, 180, 360)),
    "star": _one(regular(5, inner=0.42)),
    "heart": _one(heart()),
    "crescent": _one(crescent()),
    "cross": _one(
        [
            (x, y)
            for x, y in (
                (-0.3, -1),
                (0.3, -1),
                (0.3, -0.3),
                (1, -0.3),
                (1, 0.3),
                (0.3, 0.3),
                (0.3, 1),
                (-0.3, 1),
                (-0.3, 0.3),
                (-1, 0.3),
                (-1, -0.3),
                (-0.3, -0.3),
            )
        ]
    ),
    "ring": (Part("body", oval(0, 0, 1)), Part("hole", oval(0, 0, 0.62))),
    "arrow": _one([(-1, -0.22), (0.15, -0.22), (0.15, -0.65), (1, 0), (0.15, 0.65), (0.15, 0.22), (-1, 0.22)]),
    "spiral": _one(spiral()),
    "drop": _one([(0, -1.1), *oval(0, 0.3, 0.66, 0.66, -32, 212)]),
    "cloud": (
        Part("body", oval(-0.55, 0.15, 0.42)),
        Part("body", oval(-0.05, -0.2, 0.5)),
        Part("body", oval(0.52, 0.1, 0.45)),
        Part("body", box(-0.55, 0.1, 0.52, 0.56)),
    ),
    "sun": sun(),
    "lightning bolt": _one(
        [(0.25, -1), (-0.6, 0.15), (-0.08, 0.15), (-0.3, 1), (0.62, -0.25), (0.08, -0.25), (0.55, -1)]
    ),
    "gear": gear(),
    "house": (
        Part("body", box(-0.72, -0.1, 0.72, 0.95)),
        Part("dark", box(0.4, -0.85, 0.6, -0.3)),
        Part("dark", [(0, -1), (1, -0.05), (-1, -0.05)]),
        Part("dark", box(-0.17, 0.35, 0.2, 0.95)),
        Part("light", box(-0.58, 0.15, -0.3, 0.45)),
        Part("light", box(0.34, 0.15, 0.6, 0.45)),
    ),
    "tree": (
        Part("body", oval(0, -0.42, 0.55, 0.55)),
        Part("body", oval(-0.42, -0.05, 0.4)),
        Part("body", oval(0.42, -0.05, 0.4)),
        Part("dark", [(-0.13, 0.1), (0.13, 0.1), (0.18, 1), (-0.18, 1)]),
    ),
    "pine tree": (
        Part("dark", box(-0.13, 0.6, 0.13, 1)),
        Part("body", [(0, -1), (0.42, -0.4), (-0.42, -0.4)]),
        Part("body", [(0, -0.7), (0.58, 0.1), (-0.58, 0.1)]),
        Part("body", [(0, -0.3), (0.74, 0.68), (-0.74, 0.68)]),
    ),
    "flower": flower(),
    "leaf": (
        Part(
            "body",
            [
                *((t, -0.55 * math.sin(math.pi * (t + 1) / 2)) for t in (i / 8 for i in range(-8, 9))),
                *((t, 0.55 * math.sin(math.pi * (t + 1) / 2)) for t in (i / 8 for i in range(8, -9, -1))),
            ],
        ),
        Part("dark", stroke([(-1.3, 0), (0.75, 0)], 0.09)),
        *(Part("dark", stroke([(x, 0), (x + 0.28, s * 0.3)], 0.06)) for x in (-0.55, -0.1, 0.3) for s in (-1, 1)),
    ),
    "mushroom": (
        Part("light", [(-0.26, 0), (0.26, 0), (0.34, 0.95), (-0.34, 0.95)]),
        Part("body", oval(0, 0.12, 1, 1.05, 180, 360)),
        Part("light", oval(-0.42, -0.3, 0.17)),
        Part("light", oval(0.1, -0.58, 0.19)),
        Part("light", oval(0.5, -0.16, 0.15)),
    ),
    "cactus": (
        Part("body", [*oval(0, -0.78, 0.24, 0.22, 180, 360), (0.24, 1), (-0.24, 1)]),
        Part("body", stroke([(0, 0.35), (-0.62, 0.35), (-0.62, -0.3)], 0.26)),
        Part("body", stroke([(0, 0.1), (0.62, 0.1), (0.62, -0.55)], 0.26)),
        Part("dark", box(-0.04, -0.7, 0.04, 0.9)),
    ),
    "apple": (
        Part("body", oval(-0.33, 0.18, 0.52, 0.68)),
        Part("body", oval(0.33, 0.18, 0.52, 0.68)),
        Part("dark", stroke([(0, -0.38), (0.06, -0.68), (0.16, -0.92)], 0.1)),
        Part("dark", oval(0.42, -0.7, 0.28, 0.13)),
        Part("light", oval(-0.46, -0.05, 0.12, 0.2)),
    ),
    "carrot": (
        Part(
            "dark", [(-0.1, -0.45), (-0.5, -0.85), (-0.2, -0.82), (0, -1.05), (0.2, -0.82), (0.5, -0.85), (0.1, -0.45)]
        ),
        Part("body", [*oval(0, -0.38, 0.42, 0.2, 180, 360), (0.06, 1.1), (-0.06, 1.1)]),
        Part("dark", box(-0.36, -0.12, -0.02, -0.04)),
        Part("dark", box(0.02, 0.2, 0.25, 0.28)),
    ),
    "fish": (
        Part("dark", [(0.4, 0), (1.05, -0.5), (0.92, 0), (1.05, 0.5)]),
        Part("dark", [(-0.2, -0.4), (0.25, -0.68), (0.35, -0.25)]),
        Part("body", oval(-0.2, 0, 0.78, 0.46)),
        Part("light", oval(-0.62, -0.1, 0.13)),
        Part("dark", oval(-0.63, -0.1, 0.06)),
        Part("dark", stroke(oval(-0.5, 0, 0.22, 0.34, -60, 60), 0.07)),
    ),
    "bird": (
        Part("dark", [(-0.6, -0.5), (-1.0, -0.35), (-0.6, -0.28)]),
        Part("dark", [(0.45, 0.05), (1.05, -0.3), (1.05, 0.15), (0.6, 0.4)]),
        Part("dark", stroke([(-0.1, 0.5), (-0.1, 0.95)], 0.08)),
        Part("dark", stroke([(0.18, 0.5), (0.18, 0.95)], 0.08)),
        Part("body", oval(-0.4, -0.42, 0.32)),
        Part("body", oval(0.05, 0.1, 0.62, 0.45)),
        Part("light", oval(-0.48, -0.48, 0.09)),
        Part("dark", oval(0.18, 0.08, 0.36, 0.22, -10, 190)),
    ),
    "butterfly": (
        *(Part("body", oval(s * 0.55, -0.35, 0.48, 0.46)) for s in (-1, 1)),
        *(Part("body", oval(s * 0.45, 0.42, 0.38, 0.36)) for s in (-1, 1)),
        *(Part("light", oval(s * 0.6, -0.38, 0.2)) for s in (-1, 1)),
        *(Part("light", oval(s * 0.48, 0.42, 0.14)) for s in (-1, 1)),
        Part("dark", oval(0, 0, 0.11, 0.72)),
        *(Part("dark", stroke([(0, -0.55), (s * 0.32, -1.0)], 0.07)) for s in (-1, 1)),
    ),
    "cat": (
        *(Part("body", [(s * 0.85, -1), (s * 0.9, 0.0), (s * 0.15, -0.55)]) for s in (-1, 1)),
        Part("body", oval(0, 0.12, 0.9, 0.76)),
        *(Part("light", oval(s * 0.38, 0, 0.17, 0.19)) for s in (-1, 1)),
        *(Part("dark", oval(s * 0.38, 0, 0.07, 0.15)) for s in (-1, 1)),
        Part("dark", [(-0.12, 0.3), (0.12, 0.3), (0, 0.43)]),
        *(
            Part("dark", stroke([(s * 0.3, y), (s * 0.95, y + d)], 0.05))
            for s in (-1, 1)
            for y, d in ((0.42, -0.05), (0.52, 0.1))
        ),
    ),
    "snail": snail(),
    "car": (
        Part(
            "body",
            [(-0.6, -0.05), (-0.4, -0.55), (0.3, -0.55), (0.62, -0.05), (1, 0.02), (1, 0.4), (-1, 0.4), (-1, 0.0)],
        ),
        Part("light", [(-0.45, -0.08), (-0.32, -0.42), (-0.1, -0.42), (-0.1, -0.08)]),
        Part("light", [(0.02, -0.08), (0.02, -0.42), (0.24, -0.42), (0.45, -0.08)]),
        *(Part("dark", oval(s * 0.52, 0.4, 0.25)) for s in (-1, 1)),
        *(Part("light", oval(s * 0.52, 0.4, 0.1)) for s in (-1, 1)),
    ),
    "bus": (
        Part("body", box(-1, -0.65, 1, 0.45)),
        *(Part("light", box(x, -0.48, x + 0.34, -0.1)) for x in (-0.87, -0.41, 0.05)),
        Part("light", box(0.53, -0.48, 0.87, 0.35)),
        *(Part("dark", oval(s * 0.52, 0.47, 0.22)) for s in (-1, 1)),
    ),
    "boat": (
        Part("dark", box(-0.05, -1, 0.05, 0.4)),
        Part("light", [(0.12, -0.9), (0.75, 0.25), (0.12, 0.25)]),
        Part("light", [(-0.12, -0.65), (-0.62, 0.25), (-0.12, 0.25)]),
        Part("body", [(-1, 0.36), (1, 0.36), (0.65, 0.85), (-0.65, 0.85)]),
    ),
    "rocket": (
        *(Part("dark", [(s * 0.25, 0.2), (s * 0.65, 0.72), (s * 0.2, 0.6)]) for s in (-1, 1)),
        Part("light", [(-0.18, 0.64), (0.18, 0.64), (0, 1.1)]),
        Part("body", mirror([(0, -1.1), (0.2, -0.75), (0.32, -0.3), (0.34, 0.15), (0.24, 0.66)])),
        Part("light", oval(0, -0.25, 0.15)),
    ),
    "balloon": (
        Part("dark", stroke([(0, 0.5), (0.1, 0.75), (-0.08, 1.0), (0.05, 1.25)], 0.07)),
        Part("dark", [(0, 0.38), (0.14, 0.58), (-0.14, 0.58)]),
        Part("body", oval(0, -0.25, 0.62, 0.74)),
        Part("light", oval(-0.25, -0.5, 0.11, 0.19)),
    ),
    "kite": (
        Part("dark", stroke([(0, 0.4), (0.2, 0.7), (-0.05, 0.95), (0.2, 1.2)], 0.07)),
        Part("body", [(0, -1.1), (0.68, -0.45), (0, 0.5), (-0.68, -0.45)]),
        Part("dark", stroke([(0, -1.1), (0, 0.5)], 0.07)),
        Part("dark", stroke([(-0.68, -0.45), (0.68, -0.45)], 0.07)),
        *(
            Part("dark", [(x, y), (x + s * 0.2, y - 0.1), (x + s * 0.2, y + 0.1)])
            for x, y in ((0.2, 0.7), (-0.05, 0.95))
            for s in (-1, 1)
        ),
    ),
    "anchor": (
        Part("body", oval(0, -0.78, 0.24)),
        Part("hole", oval(0, -0.78, 0.11)),
        Part("body", box(-0.09, -0.58, 0.09, 0.9)),
        Part("body", box(-0.42, -0.42, 0.42, -0.25)),
        Part("body", stroke(oval(0, 0.15, 0.72, 0.72, 5, 175), 0.2)),
        *(Part("body", [(s * 0.98, 0.32), (s * 0.48, 0.32), (s * 0.78, -0.1)]) for s in (-1, 1)),
    ),
    "key": (
        Part("body", oval(-0.58, 0, 0.42)),
        Part("hole", oval(-0.62, 0, 0.19)),
        Part("body", box(-0.22, -0.1, 1, 0.1)),
        Part("body", box(0.8, 0, 0.96, 0.42)),
        Part("body", box(0.5, 0, 0.66, 0.34)),
    ),
    "cup": (
        Part("body", oval(0.58, -0.02, 0.36)),
        Part("hole", oval(0.58, -0.02, 0.2)),
        Part("body", [(-0.72, -0.6), (0.56, -0.6), (0.44, 0.7), (-0.6, 0.7)]),
        Part("dark", oval(-0.08, -0.6, 0.64, 0.13)),
    ),
    "ladder": (
        Part("body", [(-0.5, -1), (-0.34, -1), (-0.4, 1), (-0.58, 1)]),
        Part("body", [(0.34, -1), (0.5, -1), (0.58, 1), (0.4, 1)]),
        *(Part("body", box(-0.46, y - 0.07, 0.46, y + 0.07)) for y in (-0.72, -0.26, 0.2, 0.66)),
    ),
    "umbrella": (
        Part("dark", stroke([(0, -1), (0, 0.7), *oval(0.17, 0.72, 0.17, 0.17, 180, 20)], 0.1)),
        Part(
            "body",
            [
                *oval(0, 0, 1, 0.88, 180, 360),
                *oval(0.75, 0, 0.25, 0.14, 0, -180),
                *oval(0.25, 0, 0.25, 0.14, 0, -180),
                *oval(-0.25, 0, 0.25, 0.14, 0, -180),
                *oval(-0.75, 0, 0.25, 0.14, 0, -180),
            ],
        ),
        *(Part("dark", stroke([(0, -0.86), (s * 0.33, -0.5), (s * 0.5, -0.02)], 0.05)) for s in (-1, 1)),
    ),
    "lamp": (
        Part("dark", box(-0.07, 0, 0.07, 0.85)),
        Part("dark", oval(0, 0.95, 0.5, 0.2, 180, 360)),
        Part("body", [(-0.36, -0.95), (0.36, -0.95), (0.78, 0.12), (-0.78, 0.12)]),
    ),
    "bottle": (
        Part("body", mirror([(0.15, -0.85), (0.15, -0.42), (0.38, -0.12), (0.4, 1)])),
        Part("dark", box(-0.18, -1.05, 0.18, -0.82)),
        Part("light", box(-0.4, 0.15, 0.4, 0.62)),
    ),
    "bell": (
        Part("dark", oval(0, -0.92, 0.13)),
        Part("dark", oval(0, 0.78, 0.2)),
        Part("body", mirror([(0, -0.88), (0.35, -0.75), (0.5, -0.35), (0.56, 0.2), (0.85, 0.65)])),
        Part("dark", box(-0.74, 0.44, 0.74, 0.52)),
    ),
    "hammer": (
        Part("light", box(-0.12, -0.6, 0.12, 1.1)),
        Part("body", [(-0.7, -0.95), (0.2, -0.95), (0.62, -0.82), (0.95, -0.4), (0.5, -0.5), (-0.7, -0.42)]),
        Part("dark", box(-0.88, -1.02, -0.6, -0.35)),
    ),
    "crown": (
        Part("body", [(-1, -0.5), (-0.52, 0.05), (0, -0.8), (0.52, 0.05), (1, -0.5), (0.8, 0.68), (-0.8, 0.68)]),
        Part("dark", box(-0.78, 0.42, 0.78, 0.68)),
        *(Part("light", oval(x, y, 0.13)) for x, y in ((-1, -0.55), (0, -0.85), (1, -0.55))),
    ),
    "flag": (
        Part("dark", box(-0.85, -1, -0.72, 1)),
        Part(
            "body",
            [
                (-0.72, -0.9),
                (-0.2, -0.98),
                (0.4, -0.82),
                (0.95, -0.92),
                (0.95, 0.02),
                (0.4, 0.12),
                (-0.2, -0.04),
                (-0.72, 0.04),
            ],
        ),
    ),
    "envelope": (
        Part("body", box(-1, -0.66, 1, 0.66)),
        Part("dark", stroke([(-1, -0.62), (0, 0.15), (1, -0.62)], 0.1)),
        Part("dark", stroke([(-0.98, 0.62), (-0.25, 0)], 0.06)),
        Part("dark", stroke([(0.98, 0.62), (0.25, 0)], 0.06)),
    ),
    "clock": (
        Part("body", oval(0, 0, 1)),
        Part("light", oval(0, 0, 0.78)),
        Part("dark", stroke([(0, 0.08), (0, -0.6)], 0.11)),
        Part("dark", stroke([(-0.06, 0), (0.44, 0.22)], 0.11)),
        *(
            Part("dark", oval(0.67 * math.cos(a), 0.67 * math.sin(a), 0.06))
            for a in (0, math.pi / 2, math.pi, -math.pi / 2)
        ),
    ),
    "candle": (
        Part("light", [(0, -1.1), *oval(0, -0.6, 0.2, 0.22, -25, 205)]),
        Part("dark", box(-0.035, -0.5, 0.035, -0.22)),
        Part("body", box(-0.26, -0.25, 0.26, 0.88)),
        Part("dark", oval(0, 0.9, 0.58, 0.14)),
    ),
    "chair": (
        Part("body", box(-0.55, -1, -0.36, 1)),
        Part("body", box(0.4, 0.1, 0.57, 1)),
        Part("body", box(-0.55, 0.02, 0.62, 0.24)),
        Part("body", box(-0.55, -0.98, -0.28, 0.1)),
    ),
    "hat": (
        Part("body", [(-0.5, 0.45), (-0.52, -0.7), (0.52, -0.7), (0.5, 0.45)]),
        Part("body", oval(0, 0.46, 1, 0.2)),
        Part("dark", [(-0.5, 0.08), (0.5, 0.08), (0.5, 0.34), (-0.5, 0.34)]),
    ),
    "shirt": (
        Part(
            "body",
            [
                (-0.3, -0.85),
                (0.3, -0.85),
                (1, -0.4),
                (0.78, 0.02),
                (0.5, -0.15),
                (0.5, 0.9),
                (-0.5, 0.9),
                (-0.5, -0.15),
                (-0.78, 0.02),
                (-1, -0.4),
            ],
        ),
        Part("dark", oval(0, -0.86, 0.28, 0.22, 0, 180)),
    ),
    "ice cream": (
        Part("light", [(-0.42, 0.0), (0.42, 0.0), (0, 1.1)]),
        Part("dark", stroke([(-0.28, 0.32), (0.2, 0.06)], 0.05)),
        Part("dark", stroke([(-0.15, 0.65), (0.32, 0.2)], 0.05)),
        Part("body", oval(0, -0.4, 0.52, 0.5)),
        Part("body", box(-0.5, -0.12, 0.5, 0.08)),
    ),
    "magnifying glass": (
        Part("dark", stroke([(0.22, 0.22), (1.0, 1.0)], 0.24)),
        Part("body", oval(-0.28, -0.28, 0.66)),
        Part("hole", oval(-0.28, -0.28, 0.46)),
    ),
}
