"""Draw docs/playground.png: every style of the playground by a few kinds, textures, counts and relations.

    python docs/make_playground_sheet.py [FILE]

A star marks the style that the embedded model never saw in training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from clipadapt.data.playground import HELDOUT_STYLE, Playground
from clipadapt.data.playground.styles import STYLES

SIDE, GAP, LEFT, TOP = 64, 4, 84, 18  # pixels
COLUMNS: list[tuple[str, dict[str, Any]]] = [
    ("cat", {"kind": "cat", "colour": "orange"}),
    ("house", {"kind": "house", "colour": "red"}),
    ("umbrella", {"kind": "umbrella", "colour": "blue"}),
    ("flower", {"kind": "flower", "colour": "purple"}),
    ("striped", {"kind": "fish", "texture": "striped"}),
    ("dotted", {"kind": "mushroom", "texture": "dotted"}),
    ("three", {"kind": "star", "count": "three"}),
    ("five", {"kind": "heart", "count": "five"}),
    ("left of", {"kind": "cup", "relation": "left of"}),
    ("inside", {"kind": "bird", "relation": "inside"}),
]


def sheet() -> Image.Image:
    """One row a style, one column a request."""
    world = Playground(size=SIDE)
    step = SIDE + GAP
    page = Image.new("RGB", (LEFT + step * len(COLUMNS), TOP + step * len(STYLES)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, (title, _) in enumerate(COLUMNS):
        draw.text((LEFT + column * step + SIDE / 2, TOP / 2), title, "black", font, anchor="mm")
    for row, style in enumerate(STYLES):
        y = TOP + row * step
        draw.text((LEFT - 8, y + SIDE / 2), style + (" *" if style == HELDOUT_STYLE else ""), "black", font, "rm")
        for column, (_, fixed) in enumerate(COLUMNS):
            scene = world.scene(1000 * row + column, style=style, **fixed)
            page.paste(scene.image, (LEFT + column * step, y))
    return page


def main(file: Path) -> None:
    # 256 colours keep the file small; the playground's own images have all of theirs.
    sheet().quantize(256, kmeans=3, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("playground.png"))
