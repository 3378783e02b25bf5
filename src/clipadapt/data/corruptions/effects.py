"""How each of the fifteen corruptions changes an image.

An effect takes x (H, W, 3) float64 in [0, 1], one row of `kinds.PARAMETERS` and a generator, and gives (H, W, 3), which
`to_image` clips. The docstring of `kinds` says what is as published and what is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.signal import fftconvolve

SIDE = 224  # pixels, what the published lengths are for
_LONGEST = 8 * SIDE  # of a layer that is drawn, however long the image is

Array = np.ndarray


def _gaussian_noise(x: Array, deviation: float, rng: np.random.Generator) -> Array:
    return x + rng.normal(scale=deviation, size=x.shape)


def _shot_noise(x: Array, photons: float, rng: np.random.Generator) -> Array:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Array, share: float, rng: np.random.Generator) -> Array:
    """Salt and pepper, equally likely, on each value of each channel by itself."""
    hit, salt = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(hit, salt, x)


def _defocus_blur(x: Array, p: tuple[float, float], rng: np.random.Generator) -> Array:
    kernel = _rescale(disk(*p), _scale(x))
    reach = len(kernel) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def _glass_blur(x: Array, p: tuple[float, int, int], rng: np.random.Generator) -> Array:
    deviation, reach, times = p
    shape, s = x.shape, max(1.0, _scale(x))
    if _scale(x) < 1:  # pixels this large cannot be moved by a fraction of themselves
        height, width = _canvas(x)
        x = np.asarray(to_image(x).resize((width, height), Image.Resampling.BICUBIC)) / 255
    blur = {"sigma": (deviation * s, deviation * s, 0), "mode": "nearest"}
    x = np.floor(ndimage.gaussian_filter(x, **blur) * 255) / 255
    for _ in range(times):
        x = _overwrite(x, round(reach * s), rng)
    x = ndimage.gaussian_filter(x, **blur)
    if x.shape != shape:
        x = np.asarray(to_image(x).resize((shape[1], shape[0]), Image.Resampling.BOX)) / 255
    return x


def _motion_blur(x: Array, p: tuple[float, float], rng: np.random.Generator) -> Array:
    return _in_motion(x, *p, rng.uniform(-45, 45), _scale(x))


def _zoom_blur(x: Array, p: tuple[float, float], rng: np.random.Generator) -> Array:
    factors = np.arange(1, *p)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x: Array, p: tuple[float, ...], rng: np.random.Generator) -> Array:
    mean, deviation, zoom, threshold, radius, fall, share = p
    flakes = _zoom(rng.normal(mean, deviation, _canvas(x))[..., None], zoom)
    flakes[flakes < threshold] = 0
    flakes = np.floor(np.clip(flakes, 0, 1) * 255) / 255
    flakes = _fit(_in_motion(flakes, radius, fall, rng.uniform(-135, -45), 1.0)[..., 0], x)[..., None]
    grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
    whitened = share * x + (1 - share) * np.maximum(x, 1.5 * grey + 0.5)
    return whitened + flakes + flakes[::-1, ::-1]


def _frost(x: Array, p: tuple[float, float], rng: np.random.Generator) -> Array:
    return p[0] * x + p[1] * np.stack([_fit(channel, x) for channel in frost(_canvas(x), rng)], axis=2)


def _fog(x: Array, p: tuple[float, float], rng: np.random.Generator) -> Array:
    (thickness, decay), (height, width) = p, _canvas(x)
    haze = plasma(1 << (max(height, width) - 1).bit_length(), decay, rng)[:height, :width]
    top = x.max()
    return (x + thickness * _fit(haze, x)[..., None]) * top / (top + thickness)


def _brightness(x: Array, more: float, rng: np.random.Generator) -> Array:
    """Value + `more`, hue and saturation kept: all channels times the same factor, and black becomes grey."""
    value = x.max(axis=2, keepdims=True)
    brighter = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def _contrast(x: Array, factor: float, rng: np.random.Generator) -> Array:
    means = x.mean(axis=(0, 1), keepdims=True)
    return (x - means) * factor + means


def _elastic(x: Array, p: tuple[float, float, float], rng: np.random.Generator) -> Array:
    """A random affine map, then a smooth random displacement of each pixel."""
    strength, deviation, reach = p
    (height, width), s = x.shape[:2], _scale(x)
    middle, third = np.array([width // 2, height // 2], float), max(1, min(height, width) // 3)
    before = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])  # (x, y) of three points
    after = before + s * rng.uniform(-reach, reach, (3, 2))
    back = np.linalg.lstsq(np.column_stack([after, np.ones(3)]), before, rcond=None)[0]  # (3, 2)
    rows, columns = np.mgrid[:height, :width].astype(float)
    source = np.stack([columns, rows, np.ones_like(rows)], axis=2) @ back  # (H, W, 2): the x and y that is shown here
    x = _sample(x, source[..., 1], source[..., 0], "mirror")
    dx, dy = (
        s * strength * _fit(ndimage.gaussian_filter(field, deviation, mode="reflect", truncate=3), x)
        for field in (rng.uniform(-1, 1, _canvas(x)), rng.uniform(-1, 1, _canvas(x)))
    )
    return _sample(x, rows + dy, columns + dx, "reflect")


def _pixelate(x: Array, share: float, rng: np.random.Generator) -> Array:
    image = to_image(x)
    width, height = (max(1, int(side * share)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255


def _jpeg(x: Array, quality: int, rng: np.random.Generator) -> Array:
    file = BytesIO()
    to_image(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


EFFECTS: dict[str, Callable[[Array, Any, np.random.Generator], Array]] = {
    "gaussian-noise": _gaussian_noise,
    "shot-noise": _shot_noise,
    "impulse-noise": _impulse_noise,
    "defocus-blur": _defocus_blur,
    "glass-blur": _glass_blur,
    "motion-blur": _motion_blur,
    "zoom-blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": _elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}

# -- their parts -----------------------------------------------------------------------------------------------------


def to_image(x: Array) -> Image.Image:
    """(H, W, 3) -> 8 bits: cut as published, not rounded, but for what is below a level by rounding errors alone."""
    return Image.fromarray(np.floor(np.clip(x, 0, 1) * 255 + 1e-6).astype(np.uint8))


def _scale(x: Array) -> float:
    """Pixels of the image per pixel of the 224 that the published lengths are for."""
    return max(min(x.shape[:2]) / SIDE, max(x.shape[:2]) / _LONGEST)


def _canvas(x: Array) -> tuple[int, int]:
    """(height, width) of a layer to be drawn at the published scale."""
    height, width = (max(1, round(side / _scale(x))) for side in x.shape[:2])
    return height, width


def _fit(layer: Array, x: Array) -> Array:
    """A layer drawn on the canvas (h, w) at the image's size (H, W)."""
    height, width = x.shape[:2]
    if layer.shape == (height, width):
        return layer
    image = Image.fromarray(layer.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=float)


def disk(radius: float, deviation: float) -> Array:
    """The published kernel of defocus: a disk with a slightly softened edge, (17, 17) or (2r + 1, 2r + 1)."""
    reach = 8 if radius <= 8 else int(radius)
    offsets = np.arange(-reach, reach + 1)
    kernel = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(float)
    taps = np.arange(3) - 1 if radius <= 8 else np.arange(5) - 2
    weights = np.exp(-(taps**2) / (2 * deviation**2))
    weights /= weights.sum()
    kernel = ndimage.correlate1d(kernel / kernel.sum(), weights, axis=0, mode="mirror")
    return ndimage.correlate1d(kernel, weights, axis=1, mode="mirror")


def _rescale(kernel: Array, s: float) -> Array:
    """An odd square kernel whose cells are 1 / s pixels wide, in pixels: each gets the part of the kernel over it."""
    cells = len(kernel)
    pixels = 2 * math.ceil(cells * s / 2 - 0.5) + 1
    new, old = (np.arange(pixels + 1) - pixels / 2) / s, np.arange(cells + 1) - cells / 2  # edges, in cells
    overlap = np.minimum(new[1:, None], old[1:]) - np.maximum(new[:-1, None], old[:-1])  # (pixels, cells)
    overlap = np.maximum(overlap, 0)
    return overlap @ kernel @ overlap.T


def _in_motion(x: Array, radius: float, deviation: float, angle: float, s: float) -> Array:
    """ImageMagick's motion blur: a half Gaussian along a line of 2 radius + 1 pixels, in 8 bits.

    Pixel i of the line is ceil(i cos - 1/2) to the right and ceil(i sin - 1/2) down; edges are extended.
    """
    count = 2 * math.ceil(radius * s) + 1
    weights = np.exp(-(np.arange(count) ** 2) / (2 * (deviation * s) ** 2))
    padded = np.pad(x, ((count, count), (count, count), (0, 0)), mode="edge")
    height, width = x.shape[:2]
    out = np.zeros_like(x)
    for i, weight in enumerate(weights / weights.sum()):
        top = count + math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        left = count + math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        out += weight * padded[top : top + height, left : left + width]
    return np.round(out * 255) / 255


def _zoom(x: Array, factor: float) -> Array:
    """The middle of (H, W, K) enlarged to the whole."""
    middle = _middle(x, *(math.ceil(side / factor) for side in x.shape[:2]))
    return _middle(ndimage.zoom(middle, (factor, factor, 1), order=1), *x.shape[:2])


def _middle(x: Array, height: int, width: int) -> Array:
    top, left = (x.shape[0] - height) // 2, (x.shape[1] - width) // 2
    return x[top : top + height, left : left + width]


def _sample(x: Array, rows: Array, columns: Array, mode: str) -> Array:
    """The image at fractional places (H, W), bilinear."""
    channels = [ndimage.map_coordinates(x[..., c], [rows, columns], order=1, mode=mode) for c in range(x.shape[2])]
    return np.stack(channels, axis=2)


def _overwrite(x: Array, reach: int, rng: np.random.Generator) -> Array:
    """From the lower right to the upper left, each pixel takes the value of one at most `reach` away.

    Where that one was overwritten before, its new value is meant; such chains are followed all at once.
    """
    height, width = x.shape[:2]
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    if not len(rows) or not len(columns):
        return x
    steps = rng.integers(-reach, reach, (len(rows), len(columns), 2))  # to the right, down
    from_row, from_column = rows[:, None] + steps[..., 1], columns + steps[..., 0]
    place, taken = rows[:, None] * width + columns, from_row * width + from_column
    inside = (from_row > reach) & (from_row <= height - reach) & (from_column > reach) & (from_column <= width - reach)
    count = height * width
    link = np.tile(np.arange(count, 2 * count), 2)  # new values are 0 to count - 1, old ones come after them
    link[place] = np.where(inside & (taken > place), taken, count + taken)
    while not np.array_equal(further := link[link], link):
        link = further
    return x.reshape(count, -1)[link[:count] - count].reshape(x.shape)


def plasma(side: int, decay: float, rng: np.random.Generator) -> Array:
    """Heights (side, side) in [0, 1] by the diamond-square algorithm on a torus; `side` is a power of two.

    Each scale's disturbance is uniform in +-w^2, with w = 100 at first and divided by `decay` from scale to scale.
    """
    heights, step, w = np.zeros((side, side)), side, 100.0

    def disturb(total: Array) -> Array:
        return total / 4 + w * rng.uniform(-w, w, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        right, down = np.roll(corners, -1, 1), np.roll(corners, -1, 0)
        centres = disturb(corners + right + down + np.roll(right, -1, 0))
        heights[half::step, half::step] = centres
        heights[::step, half::step] = disturb(corners + right + centres + np.roll(centres, 1, 0))
        heights[half::step, ::step] = disturb(corners + down + centres + np.roll(centres, 1, 1))
        step, w = half, w / decay
    heights -= heights.min()
    return heights / max(heights.max(), 1e-12)


def frost(canvas: tuple[int, int], rng: np.random.Generator) -> Array:
    """Ice on a window, (3, h, w) in [0, 1]: fans of needles over a cloudy ground.

    The published photographs have, in crops of 224 pixels, mean levels of 115 to 204, deviations of 16 to 36, and more
    blue than red; brightness, contrast and tint are drawn from these ranges.
    """
    height, width = canvas
    ground = plasma(1 << (max(canvas) - 1).bit_length(), 1.8, rng)[:height, :width]
    ice = Image.new("F", (width, height))
    for shade in rng.uniform(0.2, 1, max(1, round(height * width / 1200))):  # fans, about 42 on a square canvas
        pen, heading = ImageDraw.Draw(ice), rng.uniform(0, 2 * math.pi)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        for turn, length in zip(rng.normal(0, 0.35, 14), rng.uniform(15, 70, 14), strict=True):
            x, y = x + rng.normal(0, 3), y + rng.normal(0, 3)
            end = x + length * math.cos(heading + turn), y + length * math.sin(heading + turn)
            pen.line([(x, y), end], fill=float(shade * rng.uniform(0.4, 1)), width=int(rng.integers(1, 4)))
    texture = ndimage.gaussian_filter(np.asarray(ice, dtype=float), 0.6) + 0.8 * ground
    texture += 0.15 * rng.normal(size=canvas)
    level, contrast = rng.uniform(115, 204) / 255, rng.uniform(16, 36) / 255
    texture = level + contrast * (texture - texture.mean()) / max(float(texture.std()), 1e-12)
    tint = np.array([-1, 0.2, 0.8]) * rng.uniform(7, 16) / 255
    return np.clip(texture + tint[:, None, None], 0, 1)
