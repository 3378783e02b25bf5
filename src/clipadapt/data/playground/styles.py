"""How the playground paints: colours, textures, and the styles that serve as its domains.

Everything is painted on a canvas of twice the final size, which is then halved, so edges come out smooth. A style
paints one `Cutout` (the silhouette of one object with its details) at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from clipadapt.data.playground.kinds import SHAPES
from clipadapt.data.playground.polygons import Point, Tone

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (212, 36, 36),
    "orange": (245, 132, 24),
    "yellow": (250, 215, 40),
    "green": (50, 160, 68),
    "blue": (38, 92, 214),
    "purple": (130, 58, 176),
    "pink": (248, 142, 190),
    "brown": (122, 74, 40),
    "black": (26, 26, 30),
    "white": (248, 248, 248),
    "grey": (138, 142, 146),
}


class Cutout(NamedTuple):
    """One object placed on the canvas: a tile with its silhouette."""

    origin: tuple[int, int]  # of the tile on the canvas
    mask: Image.Image  # L, 255 inside the silhouette
    outlines: list[tuple[Tone, list[Point]]]  # the shape's parts in coordinates of the tile
    colour: RGB
    texture: str
    unit: float  # canvas pixels per hundredth of the image's height: what line widths are measured in


def cut_out(
    kind: str, colour: RGB, texture: str, centre: Point, extent: float, turn: float, stretch: float, canvas: int
) -> Cutout:
    """Turn a shape (degrees), stretch it sideways, and fit its larger side to `extent` around `centre` (pixels)."""
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    parts = [
        (part.tone, [(stretch * (x * cos - y * sin), x * sin + y * cos) for x, y in part.points])
        for part in SHAPES[kind]
    ]
    xs = [x for _, points in parts for x, _ in points]
    ys = [y for _, points in parts for _, y in points]
    scale = extent / max(max(xs) - min(xs), max(ys) - min(ys))
    shift_x = centre[0] - scale * (max(xs) + min(xs)) / 2
    shift_y = centre[1] - scale * (max(ys) + min(ys)) / 2
    margin = round(canvas * 0.03)  # room for what spreads over the edge: shadow, jitter, blur
    origin = (round(scale * min(xs) + shift_x) - margin, round(scale * min(ys) + shift_y) - margin)
    size = (round(scale * (max(xs) - min(xs))) + 2 * margin + 1, round(scale * (max(ys) - min(ys))) + 2 * margin + 1)
    outlines: list[tuple[Tone, list[Point]]] = [
        (tone, [(round(scale * x + shift_x) - origin[0], round(scale * y + shift_y) - origin[1]) for x, y in points])
        for tone, points in parts
    ]
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    for tone, points in outlines:
        pen.polygon(points, fill=0 if tone == "hole" else 255)
    return Cutout(origin, mask, outlines, colour, texture, canvas / 100)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """`a` with a share of `b` in it."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def distance(a: RGB, b: RGB) -> float:
    """How different two colours look, roughly: 0 to 765."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def brightness(colour: RGB) -> float:
    """Perceived brightness of a colour (ITU-R BT.601), 0 to 255."""
    return (299 * colour[0] + 587 * colour[1] + 114 * colour[2]) / 1000


def _dark(colour: RGB) -> RGB:
    if brightness(colour) < 45:
        return mix(colour, (255, 255, 255), 0.3)  # nothing is darker than black
    return mix(colour, (0, 0, 0), 0.25 if brightness(colour) > 230 else 0.42)


def _light(colour: RGB) -> RGB:
    if brightness(colour) > 230:
        return mix(colour, (60, 80, 110), 0.22)  # nothing is lighter than white
    return mix(colour, (255, 255, 255), 0.6)


def _second(colour: RGB) -> RGB:
    """The other colour of a texture: a tone of the same hue."""
    return _dark(colour) if brightness(colour) > 185 else _light(colour)


# ---- textures: a pattern L of the tile's size, 255 where the second colour goes

Texture = Callable[[tuple[int, int], float], Image.Image]


def _stripes(size: tuple[int, int], unit: float) -> Image.Image:
    pattern, period = Image.new("L", size), 11 * unit
    pen = ImageDraw.Draw(pattern)
    for i in range(math.ceil((size[0] + size[1]) / period) + 1):
        x = i * period
        pen.line([(x, -1), (x - size[1], size[1] - 1)], fill=255, width=max(1, round(period * 0.36)))
    return pattern


def _dots(size: tuple[int, int], unit: float) -> Image.Image:
    pattern, period = Image.new("L", size), 11 * unit
    pen, radius = ImageDraw.Draw(pattern), 11 * unit * 0.3
    for row in range(math.ceil(size[1] / period) + 1):
        for column in range(math.ceil(size[0] / period) + 1):
            x, y = (column + row % 2 / 2) * period, row * period
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    return pattern


def _checks(size: tuple[int, int], unit: float) -> Image.Image:
    pattern, period = Image.new("L", size), 9 * unit
    pen = ImageDraw.Draw(pattern)
    for row in range(math.ceil(size[1] / period)):
        for column in range(row % 2, math.ceil(size[0] / period), 2):
            pen.rectangle([column * period, row * period, (column + 1) * period - 1, (row + 1) * period - 1], fill=255)
    return pattern


def _gradient(size: tuple[int, int], unit: float) -> Image.Image:
    return Image.linear_gradient("L").resize(size)


TEXTURES: dict[str, Texture | None] = {
    "plain": None,
    "striped": _stripes,
    "dotted": _dots,
    "checked": _checks,
    "gradient": _gradient,
}


def _cloth(cut: Cutout, base: RGB, second: RGB) -> Image.Image:
    """A tile in one colour with the cutout's texture in another."""
    cloth, texture = Image.new("RGB", cut.mask.size, base), TEXTURES[cut.texture]
    if texture is not None:
        cloth.paste(second, (0, 0), texture(cut.mask.size, cut.unit))
    return cloth


def _recolour(cut: Cutout, colour: RGB) -> Image.Image:
    """The cutout's tile in `colour`: texture, then the shape's details in darker and lighter tones."""
    cloth = _cloth(cut, colour, _second(colour))
    tile = cloth.copy()
    pen = ImageDraw.Draw(tile)
    tones = {"body": colour, "dark": _dark(colour), "light": _light(colour)}
    for tone, points in cut.outlines:
        if tone == "body" and cut.texture != "plain":
            part = Image.new("L", tile.size)
            ImageDraw.Draw(part).polygon(points, fill=255)
            tile.paste(cloth, (0, 0), part)
        elif tone != "hole":
            pen.polygon(points, fill=tones[tone])
    return tile


_FULL = [0] * 255 + [255]  # keeps white, turns every grey black


def _edge(cut: Cutout, width: float) -> Image.Image:
    """The band of `width` canvas pixels inside the silhouette's edge."""
    inside = cut.mask.filter(ImageFilter.BoxBlur(max(1, round(width)))).point(_FULL)
    return ImageChops.subtract(cut.mask, inside)


def _lines(cut: Cutout, width: float) -> Image.Image:
    """The silhouette's edge and the outlines of its details, as a drawing in lines."""
    lines = _edge(cut, width)
    details = Image.new("L", cut.mask.size)
    pen = ImageDraw.Draw(details)
    for tone, points in cut.outlines:
        if tone == "body":
            pen.polygon(points, fill=0)  # hides what is behind it
        elif tone != "hole":
            pen.polygon(points, fill=0, outline=255, width=max(1, round(width)))
    return ImageChops.lighter(lines, ImageChops.darker(details, cut.mask))


def _clouds(rng: np.random.Generator, size: tuple[int, int], low: int, high: int, grains: int = 5) -> Image.Image:
    """Smooth random blotches of grey between two levels."""
    seeds = rng.integers(low, high + 1, (grains, grains), dtype=np.uint8)
    return Image.fromarray(seeds).resize(size, Image.Resampling.BICUBIC)


# ---- styles


def _flat(canvas: Image.Image, cut: Cutout, rng: np.random.Generator) -> None:
    canvas.paste(_recolour(cut, cut.colour), cut.origin, cut.mask)


def _outline(canvas: Image.Image, cut: Cutout, rng: np.random.Generator) -> None:
    paper = canvas.getpixel((0, 0))
    cloth = _cloth(cut, paper, mix(paper, cut.colour, 0.75))  # type: ignore[arg-type]
    canvas.paste(cloth, cut.origin, cut.mask)
    canvas.paste(cut.colour, cut.origin, _lines(cut, 3.2 * cut.unit))


def _sketch(canvas: Image.Image, cut: Cutout, rng: np.random.Generator) -> None:
    hatch = Image.new("L", cut.mask.size)
    pen = ImageDraw.Draw(hatch)
    width, height = hatch.size
    x = 0.0
    while x < width + height:
        x += (3.6 + 1.6 * rng.random()) * cut.unit
        slip = (rng.random() - 0.5) * 6 * cut.unit
        pen.line([(x, 0), (x + slip - height, height)], fill=235, width=max(1, round(1.7 * cut.unit)))
    wash = cut.mask.point([value * 90 // 255 for value in range(256)])
    tile = _recolour(cut, cut.colour)
    canvas.paste(tile, cut.origin, wash)
    canvas.paste(tile, cut.origin, ImageChops.darker(hatch, cut.mask))
    pencil, lines = _dark(cut.colour), _lines(cut, 1.4 * cut.unit)
    if brightness(cut.colour) > 230:
        pencil = (96, 96, 100)
    for _ in range(2):  # every line is drawn twice, never quite in the same place
        a, b = (rng.random(2) - 0.5) * 0.07
        c, d = (rng.random(2) - 0.5) * 4 * cut.unit
        shaken = lines.transform(
            lines.size,
            Image.Transform.AFFINE,
            (1 + b, a, c - a * height / 2 - b * width / 2, -a, 1 + b, d + a * width / 2 - b * height / 2),
            Image.Resampling.BILINEAR,
        )
        canvas.paste(pencil, cut.origin, shaken)


def _watercolour(canvas: Image.Image, cut: Cutout, rng: np.random.Generator) -> None:
    soft = cut.mask.filter(ImageFilter.BoxBlur(1.2 * cut.unit))
    pigment = ImageChops.multiply(soft, _clouds(rng, soft.size, 165, 255))
    canvas.paste(_recolour(cut, cut.colour), cut.origin, pigment)
    rim = _edge(cut, 1.5 * cut.unit).filter(ImageFilter.BoxBlur(0.6 * cut.unit))
    canvas.paste(_dark(cut.colour), cut.origin, ImageChops.multiply(rim, Image.new("L", rim.size, 120)))


def _chalk(canvas: Image.Image, cut: Cutout, rng: np.random.Generator) -> None:
    dust = Image.fromarray(rng.integers(110, 256, cut.mask.size[::-1], dtype=np.uint8))
    canvas.paste(_recolour(cut, cut.colour), cut.origin, ImageChops.multiply(cut.mask, dust))
    rim = mix(cut.colour, (255, 255, 255), 0.45 if brightness(cut.colour) > 45 else 0)  # black would turn grey
    canvas.paste(rim, cut.origin, ImageChops.multiply(_edge(cut, 1.5 * cut.unit), dust))


_LAMP = ImageChops.invert(Image.radial_gradient("L"))  # bright in the middle, dark in the corners


def _photo(canvas: Image.Image, cut: Cutout, rng: np.random.Generator) -> None:
    width, height = cut.mask.size
    reach = round(2.2 * cut.unit)
    shadow = ImageChops.offset(cut.mask, reach, reach).filter(ImageFilter.BoxBlur(reach))
    canvas.paste((12, 12, 18), cut.origin, ImageChops.multiply(shadow, Image.new("L", shadow.size, 120)))
    tile = _recolour(cut, cut.colour)
    # The lamp is at the upper left: a highlight there, shade at the lower right.
    lamp = _LAMP.crop((48, 48, 256, 256)).resize((width, height))
    shade = lamp.point([min(255, 115 + value) for value in range(256)])
    gloss = lamp.point([max(0, value - 180) for value in range(256)])
    tile = ImageChops.multiply(tile, Image.merge("RGB", [shade] * 3))
    tile = ImageChops.screen(tile, Image.merge("RGB", [gloss] * 3))
    canvas.paste(tile, cut.origin, cut.mask)


def _smooth_backdrop(canvas: Image.Image, paper: RGB, rng: np.random.Generator, spread: int) -> None:
    seeds = np.array(paper) + rng.integers(-spread, spread + 1, (3, 3, 1)) + rng.integers(-8, 9, (3, 3, 3))
    field = Image.fromarray(np.clip(seeds, 0, 255).astype(np.uint8))
    canvas.paste(field.resize(canvas.size, Image.Resampling.BICUBIC))


def _tiles(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The canvas laid in tiles, each of one colour and a slightly different brightness, with joints between them."""
    side, count = canvas.width, 36
    small = np.asarray(canvas.resize((count, count), Image.Resampling.BOX)).astype(np.int16)
    small = np.clip(small + rng.integers(-16, 17, (count, count, 1)), 0, 255).astype(np.uint8)
    laid = Image.fromarray(small).resize(canvas.size, Image.Resampling.NEAREST)
    joints = Image.new("L", canvas.size)
    pen = ImageDraw.Draw(joints)
    for i in range(count):
        at, width = round(i * side / count), max(1, side // 128)
        pen.line([(at, 0), (at, side)], fill=55, width=width)
        pen.line([(0, at), (side, at)], fill=55, width=width)
    laid.paste((40, 40, 44), (0, 0), joints)
    return laid


@dataclass(frozen=True)
class Style:
    """One way of drawing: papers to choose from, how an object is painted, and what happens to the whole image."""

    papers: tuple[RGB, ...]
    paint: Callable[[Image.Image, Cutout, np.random.Generator], None]
    backdrop: int = 0  # how much the paper's brightness varies over the image, in grey levels
    finish: Callable[[Image.Image, np.random.Generator], Image.Image] | None = None
    noise: int = 0  # largest disturbance of a final pixel, in grey levels

    def paper_for(self, colours: list[RGB], rng: np.random.Generator) -> RGB:
        """A random paper on which all of `colours` stand out; the best one if none is good enough."""
        papers = [self.papers[i] for i in rng.permutation(len(self.papers))]
        contrasts = [min(distance(paper, colour) for colour in colours) for paper in papers]
        good = [paper for paper, contrast in zip(papers, contrasts, strict=True) if contrast >= 200]
        return good[0] if good else papers[contrasts.index(max(contrasts))]

    def render(self, cuts: list[Cutout], canvas: int, rng: np.random.Generator) -> Image.Image:
        """The finished image of half the canvas's size."""
        paper = self.paper_for([cut.colour for cut in cuts], rng)
        image = Image.new("RGB", (canvas, canvas), paper)
        if self.backdrop:
            _smooth_backdrop(image, paper, rng, self.backdrop)
        for cut in cuts:
            self.paint(image, cut, rng)
        if self.finish:
            image = self.finish(image, rng)
        image = image.reduce(2)
        if self.noise:
            disturbed = np.asarray(image).astype(np.int16)
            disturbed += rng.integers(-self.noise, self.noise + 1, disturbed.shape, dtype=np.int16)
            image = Image.fromarray(np.clip(disturbed, 0, 255).astype(np.uint8))
        return image


_PALE = ((255, 255, 255), (244, 240, 228), (226, 236, 244), (232, 242, 228), (246, 228, 232))
_DEEP = ((36, 44, 66), (30, 52, 50), (66, 46, 60))
_MIDDLE = ((120, 150, 180), (150, 160, 130), (176, 150, 124), (96, 108, 120))

STYLES: dict[str, Style] = {
    "flat": Style((*_PALE, *_DEEP, *_MIDDLE), _flat),
    "outline": Style((*_PALE, *_DEEP), _outline),
    "sketch": Style(((252, 250, 244), (240, 232, 214), (206, 184, 146)), _sketch, backdrop=4, noise=7),
    "watercolour": Style((*_PALE, (166, 190, 214), (206, 186, 156)), _watercolour, backdrop=14),
    "chalk": Style(((40, 52, 48), (34, 36, 44), (60, 74, 90), (104, 112, 116)), _chalk, backdrop=10, noise=6),
    "photo": Style((*_MIDDLE, (214, 206, 194), (70, 84, 74), (92, 74, 66), (190, 204, 216)), _photo, 38, noise=14),
    "mosaic": Style((*_PALE, *_DEEP, *_MIDDLE), _flat, backdrop=12, finish=_tiles),
}
