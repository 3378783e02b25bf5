"""Augmented views beyond a crop: MoCo v3's of colours and blur, and AugMix. All that they draw comes from `rng`."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor


def moco_v3(image: Image.Image, rng: random.Random) -> Image.Image:
    """Colour jitter in four of five cases, grey in one of five, and a blur (MoCo v3, arXiv 2104.02057).

    Factors of brightness and contrast in 0.6-1.4, of saturation in 0.8-1.2, hue turned by up to a tenth of the circle,
    in random order; the blur's deviation is 0.1-2 pixels of an image of 224, and shrinks with smaller ones.
    """
    if rng.random() < 0.8:
        steps: list[Callable[[Image.Image], Image.Image]] = [
            lambda im: ImageEnhance.Brightness(im).enhance(rng.uniform(0.6, 1.4)),
            lambda im: ImageEnhance.Contrast(im).enhance(rng.uniform(0.6, 1.4)),
            lambda im: ImageEnhance.Color(im).enhance(rng.uniform(0.8, 1.2)),
            lambda im: _turn_hue(im, rng.uniform(-0.1, 0.1)),
        ]
        rng.shuffle(steps)
        for step in steps:
            image = step(image)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * min(image.size) / 224))


def _turn_hue(image: Image.Image, share: float) -> Image.Image:
    hue, *rest = image.convert("HSV").split()
    turn = round(share * 256)
    return Image.merge("HSV", [hue.point([(value + turn) % 256 for value in range(256)]), *rest]).convert("RGB")


def augmix(image: Image.Image, preprocess: Callable[[Image.Image], Tensor], rng: random.Random) -> Tensor:
    """A random mix (3, H, W) of the preprocessed image and three chains of one to three mild operations each.

    AugMix (Hendrycks et al., arXiv 1912.02781) at severity 1: the chains are weighed by Dirichlet(1, 1, 1), their sum
    and the image itself by Beta(1, 1).
    """
    cuts = sorted([0.0, rng.random(), rng.random(), 1.0])  # the gaps of uniform cuts are Dirichlet(1, 1, 1)
    share = rng.random()  # Beta(1, 1)
    plain = preprocess(image)
    mixed = torch.zeros_like(plain)
    for left, right in pairwise(cuts):
        changed = image
        for _ in range(rng.randint(1, 3)):
            changed = rng.choice(_MILD)(changed, rng)
        mixed = mixed + (right - left) * preprocess(changed)
    return share * plain + (1 - share) * mixed


def _draw(rng: random.Random, most: float) -> float:
    """Up to a tenth of an operation's `most`, which is severity 1, in either direction."""
    return rng.choice((-1, 1)) * most * rng.uniform(0.1, 1.0) / 10


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


_MILD: list[Callable[[Image.Image, random.Random], Image.Image]] = [
    lambda im, rng: ImageOps.autocontrast(im),
    lambda im, rng: ImageOps.equalize(im),
    lambda im, rng: ImageOps.posterize(im, 4 - int(abs(_draw(rng, 4)))),
    lambda im, rng: im.rotate(int(_draw(rng, 30)), Image.Resampling.BILINEAR),
    lambda im, rng: ImageOps.solarize(im, 256 - int(abs(_draw(rng, 256)))),
    lambda im, rng: _affine(im, 1, _draw(rng, 0.3), 0, 0, 1, 0),
    lambda im, rng: _affine(im, 1, 0, 0, _draw(rng, 0.3), 1, 0),
    lambda im, rng: _affine(im, 1, 0, int(_draw(rng, im.width / 3)), 0, 1, 0),
    lambda im, rng: _affine(im, 1, 0, 0, 0, 1, int(_draw(rng, im.height / 3))),
]
