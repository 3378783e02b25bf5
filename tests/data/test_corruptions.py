"""The fifteen corruptions against their published definitions, and data sets whose images are corrupted lazily."""

from __future__ import annotations

import colorsys
import math
import pickle
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from clipadapt.backbones import load_backbone
from clipadapt.data import Playground
from clipadapt.data.corruptions.effects import EFFECTS, SIDE, _overwrite, _rescale, disk, frost, plasma
from clipadapt.data.corruptions.kinds import GROUPS, KINDS, PARAMETERS, SEVERITIES, corrupt, corrupted, kinds_of
from clipadapt.data.items import FeatureItem
from clipadapt.errors import ClipadaptError, DataError
from clipadapt.features import encode_images
from tests.images import colours
from tests.tiny import tiny_clip


def flat(level: int, side: int = SIDE) -> Image.Image:
    return Image.new("RGB", (side, side), (level, level, level))


def natural(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """An image with things of many scales, as photographs have: noise whose spectrum falls with the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    x = np.stack([np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequency).real for _ in range(3)], 2)
    x += 0.7 * x.mean(axis=2, keepdims=True)
    return Image.fromarray(np.clip(120 + 45 * x / x.std(), 0, 255).astype(np.uint8))


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float) / 255


def of(kind: str, severity: int, x: np.ndarray, seed: int = 0) -> np.ndarray:
    """The corruption before it is clipped and cut to 8 bits."""
    return EFFECTS[kind](x, PARAMETERS[kind][severity - 1], np.random.default_rng(seed))


def test_fifteen_kinds_in_four_groups():
    assert len(KINDS) == 15
    assert [kind for group in GROUPS.values() for kind in group] == list(KINDS)
    assert [len(group) for group in GROUPS.values()] == [3, 4, 4, 4]
    assert all(len(PARAMETERS[kind]) == 5 for kind in KINDS)
    assert kinds_of("all") == KINDS
    assert kinds_of(["fog", "noise", "fog"]) == ("fog", *KINDS[:3])
    with pytest.raises(ClipadaptError, match="jpeg"):
        kinds_of("jpegs")


# -- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_published_strength(severity):
    x = np.full((SIDE, SIDE, 3), 0.5)
    sigma, photons, share = (PARAMETERS[k][severity - 1] for k in KINDS[:3])
    noise = of("gaussian-noise", severity, x) - x
    assert noise.std() == pytest.approx(sigma, rel=0.01)
    assert abs(noise.mean()) < 0.005
    shot = of("shot-noise", severity, x)
    assert shot.mean() == pytest.approx(0.5, rel=0.02)
    assert shot.var() == pytest.approx(0.5 / photons, rel=0.03)
    np.testing.assert_allclose(shot * photons, np.round(shot * photons), atol=1e-9)
    impulse = of("impulse-noise", severity, x)
    assert set(np.unique(impulse)) == {0.0, 0.5, 1.0}
    for value in (0.0, 1.0):
        assert (impulse == value).mean() == pytest.approx(share / 2, rel=0.06)
    alone = (impulse != 0.5).sum(axis=2)
    assert set(np.unique(alone)) >= {0, 1, 2}, "channels are hit one by one"


def test_published_noise_parameters():
    assert PARAMETERS["gaussian-noise"] == (0.08, 0.12, 0.18, 0.26, 0.38)
    assert PARAMETERS["shot-noise"] == (60, 25, 12, 5, 3)
    assert PARAMETERS["impulse-noise"] == (0.03, 0.06, 0.09, 0.17, 0.27)


def test_images_are_cut_to_8_bits_as_published():
    x = np.asarray(natural(1)) / 255
    rng = np.random.default_rng([5, 0])
    expected = np.uint8(np.clip(x + rng.normal(scale=0.18, size=x.shape), 0, 1) * 255)
    assert (np.asarray(corrupt(natural(1), "gaussian-noise", 3, seed=5)) == expected).mean() > 0.9999


# -- blur ------------------------------------------------------------------------------------------------------------


def impulse(side: int = SIDE) -> np.ndarray:
    x = np.zeros((side, side, 3))
    x[side // 2, side // 2] = 1
    return x


@pytest.mark.parametrize(("severity", "radius"), list(enumerate((3, 4, 6, 8, 10), 1)))
def test_defocus_is_a_disk(severity, radius):
    seen = of("defocus-blur", severity, impulse())[..., 0]
    rows, columns = np.nonzero(seen > 1e-9)
    far = np.hypot(rows - SIDE // 2, columns - SIDE // 2).max()
    assert radius <= far <= radius + 2.9, "softened by at most two pixels each way"
    hard = sum(a * a + b * b <= radius**2 for a in range(-radius, radius + 1) for b in range(-radius, radius + 1))
    assert seen[SIDE // 2, SIDE // 2] == pytest.approx(1 / hard, rel=0.01)
    assert seen.sum() == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(seen[1:, 1:], seen[1:, 1:][::-1, ::-1], atol=1e-12)
    x = values(natural(2))
    kernel, reach = disk(*PARAMETERS["defocus-blur"][severity - 1]), (17 if radius <= 8 else 21) // 2
    y, c = 3, 100  # near an edge, which is mirrored without being repeated
    mirrored = [abs(y + a) for a in range(-reach, reach + 1)]
    expected = (kernel * x[mirrored][:, c - reach : c + reach + 1, 1]).sum()
    assert of("defocus-blur", severity, x)[y, c, 1] == pytest.approx(expected, abs=1e-9)


def test_scaled_kernels_keep_their_sum_and_shrink():
    kernel = disk(8, 0.5)
    np.testing.assert_allclose(_rescale(kernel, 1.0), kernel, atol=1e-15)
    for s in (0.2, 0.5, 0.99, 1.7, 3.0):
        other = _rescale(kernel, s)
        assert other.sum() == pytest.approx(kernel.sum())
        offsets = np.arange(len(other)) - len(other) // 2
        spread, whole = ((k.sum(0) * o**2).sum() / k.sum() for k, o in ((other, offsets), (kernel, np.arange(17) - 8)))
        assert spread == pytest.approx(s * s * whole + 0.083 * abs(1 - s * s), rel=0.25)


def test_glass_blur_follows_the_published_loop():
    reach, side = 2, 15
    x = np.random.default_rng(1).random((side, side + 3, 3))
    draws = np.random.default_rng(7)
    region = (side - 2 * reach, side + 3 - 2 * reach)
    steps = np.random.default_rng(7).integers(-reach, reach, (*region, 2))
    plain = x.copy()
    for i, h in enumerate(range(side - reach, reach, -1)):
        for j, w in enumerate(range(side + 3 - reach, reach, -1)):
            dx, dy = steps[i, j]
            plain[h, w], plain[h + dy, w + dx] = plain[h + dy, w + dx], plain[h, w]  # views: no swap
    np.testing.assert_array_equal(_overwrite(x, reach, draws), plain)


@pytest.mark.parametrize(
    ("severity", "radius", "sigma"), [(1, 10, 3), (2, 15, 5), (3, 15, 8), (4, 15, 12), (5, 20, 15)]
)
def test_motion_blur_is_half_a_gaussian_along_a_line(severity, radius, sigma):
    seen = of("motion-blur", severity, 255 * impulse(), seed=3)[..., 0] / 255  # out of reach of 8 bits' rounding
    angle = math.radians(np.random.default_rng(3).uniform(-45, 45))
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    expected, middle = np.zeros((SIDE, SIDE)), SIDE // 2
    for i, weight in enumerate(weights / weights.sum()):
        row, column = (math.ceil(i * f(angle) - 0.5) for f in (math.sin, math.cos))
        expected[middle - row, middle - column] += weight
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    assert np.asarray(corrupt(flat(77), "motion-blur", severity)).min() == 77, "edges go on"


@pytest.mark.parametrize(("severity", "end"), [(1, 1.11), (2, 1.16), (3, 1.2), (4, 1.24), (5, 1.3)])
def test_zoom_blur_averages_enlarged_middles(severity, end):
    factors = np.arange(1, *PARAMETERS["zoom-blur"][severity - 1])
    assert factors[-1] == pytest.approx(end, abs=0.0101)
    x = values(natural(3))
    far, near = (np.abs(of("zoom-blur", severity, x) - x)[part].mean() for part in (slice(0, 20), slice(108, 116)))
    assert far > near, "it grows from the middle outwards"
    steady = of("zoom-blur", severity, np.full((SIDE, SIDE, 3), 0.3))
    np.testing.assert_allclose(steady, 0.3, atol=1e-12)


# -- weather ---------------------------------------------------------------------------------------------------------


def test_snow_whitens_and_falls():
    black = of("snow", 1, np.zeros((SIDE, SIDE, 3)), seed=1)
    ground = 0.2 * 0.5  # of black: (1 - 0.8) * max(0, 0 * 1.5 + 0.5)
    assert np.median(black) == pytest.approx(ground)
    assert black.min() == pytest.approx(ground)
    flakes = black - ground
    np.testing.assert_allclose(flakes, flakes[::-1, ::-1], atol=1e-12, err_msg="laid over twice, once turned round")
    grey = of("snow", 5, np.full((SIDE, SIDE, 3), 0.4), seed=1)
    assert grey.min() == pytest.approx(0.55 * 0.4 + 0.45 * (1.5 * 0.4 + 0.5))
    along, across = (np.abs(np.diff(flakes[..., 0], axis=axis)).mean() for axis in (0, 1))
    assert along < across, "streaks run downwards"


@pytest.mark.parametrize(
    ("severity", "a", "b"), [(1, 1, 0.4), (2, 0.8, 0.6), (3, 0.7, 0.7), (4, 0.65, 0.7), (5, 0.6, 0.75)]
)
def test_frost_is_a_sum(severity, a, b):
    x = values(natural(4))
    ice = frost((SIDE, SIDE), np.random.default_rng(2)).transpose(1, 2, 0)
    np.testing.assert_allclose(of("frost", severity, x, seed=2), a * x + b * ice)


def test_frost_textures_are_like_the_photographs():
    found = np.array([frost((SIDE, SIDE), np.random.default_rng(seed)) for seed in range(6)])
    levels = 255 * found.mean(axis=(1, 2, 3))
    assert 100 < levels.min() < levels.max() < 215
    assert all(10 < 255 * ice.mean(0).std() < 40 for ice in found)
    assert (found[:, 0].mean((1, 2)) < found[:, 2].mean((1, 2))).all(), "bluish"
    assert not np.array_equal(found[0], found[1])


def test_fog_follows_its_formula_and_decays_with_scale():
    x = values(natural(5))
    haze = plasma(256, 2, np.random.default_rng(4))[:SIDE, :SIDE, None]
    top = x.max()
    np.testing.assert_allclose(of("fog", 1, x, seed=4), (x + 1.5 * haze) * top / (top + 1.5))
    assert PARAMETERS["fog"] == ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
    rough, smooth = (np.abs(np.diff(plasma(64, decay, np.random.default_rng(0)), axis=0)).mean() for decay in (1.4, 3))
    assert rough > 3 * smooth
    heights = plasma(64, 2, np.random.default_rng(0))
    assert (heights.min(), heights.max()) == (0, 1)
    assert np.abs(heights[0] - heights[-1]).mean() < 4 * np.abs(np.diff(heights, axis=0)).mean(), "a torus"


@pytest.mark.parametrize(("severity", "more"), list(enumerate((0.1, 0.2, 0.3, 0.4, 0.5), 1)))
def test_brightness_adds_to_the_value(severity, more):
    rng = np.random.default_rng(6)
    x = np.concatenate([rng.random((5, 6, 3)), np.zeros((1, 6, 3)), np.ones((1, 6, 3))])
    seen = of("brightness", severity, x)
    for pixel, found in zip(x.reshape(-1, 3), seen.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        np.testing.assert_allclose(found, colorsys.hsv_to_rgb(h, s, min(1, v + more)), atol=1e-12)


# -- digital ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "factor"), list(enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1)))
def test_contrast_shrinks_towards_the_mean(severity, factor):
    x = values(natural(7))
    means = x.mean((0, 1))
    np.testing.assert_allclose(of("contrast", severity, x), means + factor * (x - means))
    cut = np.floor((means + factor * (x - means)) * 255 + 1e-6)
    np.testing.assert_array_equal(np.asarray(corrupt(natural(7), "contrast", severity)), cut)


@pytest.mark.parametrize(("severity", "share"), list(enumerate((0.6, 0.5, 0.4, 0.3, 0.25), 1)))
def test_pixelate_keeps_so_many_pixels(severity, share):
    x = np.asarray(corrupt(natural(8), "pixelate", severity))
    kept = int(SIDE * share)
    assert kept == (134, 112, 89, 67, 56)[severity - 1]
    if SIDE % kept == 0:  # blocks of whole pixels: each is the mean of what lay there
        side = SIDE // kept
        blocks = x.reshape(kept, side, kept, side, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()
        means = np.asarray(natural(8)).astype(float).reshape(kept, side, kept, side, 3).mean((1, 3))
        assert np.abs(blocks[:, 0, :, 0] - means).max() <= 1
    small = natural(8).resize((kept, kept), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.BOX)
    np.testing.assert_array_equal(x, np.asarray(small))


@pytest.mark.parametrize(("severity", "quality"), list(enumerate((25, 18, 15, 10, 7), 1)))
def test_jpeg_is_of_that_quality(severity, quality):
    file = BytesIO()
    natural(9).save(file, "JPEG", quality=quality)
    expected = Image.open(file)
    np.testing.assert_array_equal(np.asarray(corrupt(natural(9), "jpeg", severity)), np.asarray(expected))
    standard = [(t * (5000 // quality if quality < 50 else 200 - 2 * quality) + 50) // 100 for t in (16, 11, 10)]
    assert expected.quantization[0][0] == min(255, standard[0])


def test_elastic_moves_as_far_as_published():
    shown = np.zeros((SIDE, SIDE, 3))
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    shown[..., 0], shown[..., 1] = rows, columns  # an image that says where each pixel came from
    for severity, furthest in ((1, 24.4), (2, 48.8), (3, 4.88), (4, 4.88), (5, 4.88)):
        moved = SIDE * np.abs(of("elastic", severity, shown, seed=5) - shown)[60:-60, 60:-60, :2]
        assert 0.2 < moved.mean() < 2.5 * furthest
    fields = [SIDE * (of("elastic", s, shown, seed=5) - shown)[60:-60, 60:-60, 0] for s in (3, 5)]
    rough = [np.abs(np.diff(f, 2, axis=0)).mean() for f in fields]
    assert rough[1] / rough[0] == pytest.approx(0.12 / 0.05, rel=0.15), "same field, strength 244 * 0.05 and 244 * 0.12"
    np.testing.assert_allclose(PARAMETERS["elastic"][0], (488, 170.8, 24.4))


# -- all -------------------------------------------------------------------------------------------------------------


# Severities whose distance to the image grows; where it is not all five, the published parameters have it so.
GROWING = {kind: [SEVERITIES] for kind in KINDS} | {
    "glass-blur": [(1, 3), (2, 4, 5)],  # the reach grows as the times fall
    "snow": [(1, 2, 4, 5)],  # from 2 to 3 flakes become larger, and fewer
    "frost": [(1, 2, 3)],  # from 4 on the ice grows no more, and less is left of the image
    "fog": [(1, 2, 3, 5)],  # 4 is as thick as 3, and rougher
    "elastic": [(3, 4, 5)],  # 1 and 2 move the whole, the others wrinkle it
}


@pytest.mark.parametrize("side", [SIDE, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_severity_grows(kind, side):
    images = [natural(seed, side, side) for seed in range(2)]
    seen = {s: [values(corrupt(image, kind, s, seed=1)) for image in images] for s in SEVERITIES}
    plain = [values(image) for image in images]
    distance = {s: np.mean([np.abs(x - y).mean() for x, y in zip(seen[s], plain, strict=True)]) for s in SEVERITIES}
    for severities in GROWING[kind]:
        grown = [distance[s] for s in severities]
        assert grown == sorted(grown)
    assert distance[1] > 0
    if kind == "frost":
        hidden = [np.corrcoef(seen[s][0].ravel(), plain[0].ravel())[0, 1] for s in SEVERITIES]
        assert hidden == sorted(hidden, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (90, 31), (301, 260)])
def test_any_size(kind, size):
    for severity in (1, 5):
        seen = corrupt(natural(1, *size), kind, severity, seed=2)
        assert (seen.size, seen.mode) == (size, "RGB")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_arguments_give_equal_images(kind):
    first, again, other = (np.asarray(corrupt(natural(1, 64, 64), kind, 3, seed=s)) for s in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    fixed = kind in ("defocus-blur", "zoom-blur", "brightness", "contrast", "pixelate", "jpeg")
    assert np.array_equal(first, other) == fixed


@pytest.mark.parametrize("kind", ["defocus-blur", "motion-blur", "glass-blur", "elastic", "fog", "frost", "snow"])
def test_half_the_size_looks_half_as_large(kind):
    """Corrupting a shrunk image is much like shrinking the corrupted one, since lengths shrink with it."""
    large = natural(11)
    small = large.resize((112, 112), Image.Resampling.BOX)
    expected = values(corrupt(large, kind, 4, seed=1).resize((112, 112), Image.Resampling.BOX))
    found = values(corrupt(small, kind, 4, seed=1))
    assert np.abs(found - expected).mean() < 0.35 * np.abs(values(small) - expected).mean()


def test_mistakes_are_named():
    for wrong in ({"kind": "foggy"}, {"severity": 0}, {"severity": 6}, {"seed": -1}):
        with pytest.raises(ClipadaptError):
            corrupt(flat(9, 8), **({"kind": "fog", "severity": 1, "seed": 0} | wrong))
    with pytest.raises(DataError, match="severity"):
        corrupted(colours(1, seed=1), "fog", 7)
    with pytest.raises(DataError, match="at least"):
        corrupted(colours(1, seed=1), "fog", 1, size=0)


# -- data sets -------------------------------------------------------------------------------------------------------


def test_a_data_set_is_corrupted_when_it_is_opened():
    plain = colours(3, seed=1)
    data = corrupted(plain, "gaussian-noise", 2, 7)
    assert (data.labels, data.class_names, len(data)) == (plain.labels, plain.class_names, len(plain))
    assert "gaussian-noise 2" in data.name
    first, again = (np.asarray(data.items[0].open()) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    same = corrupted(plain.select([0]).rename({"red": "rust"}), "gaussian-noise", 2, 7)
    np.testing.assert_array_equal(np.asarray(same.items[0].open()), first, err_msg="neither place nor label matters")
    noise = [
        np.asarray(item.open()).astype(int) - np.asarray(before.open())
        for item, before in zip(data.items[:2], plain.items, strict=False)
    ]
    assert not np.array_equal(*noise), "each image has noise of its own"
    assert isinstance(pickle.loads(pickle.dumps(data.items[0])).open(), Image.Image)


def test_digests_tell_corruptions_apart():
    plain = colours(1, seed=1)
    variants = [("fog", 1, 0, None), ("fog", 2, 0, None), ("fog", 1, 1, None), ("snow", 1, 0, None), ("fog", 1, 0, 16)]
    digests = {corrupted(plain, kind, s, seed, size=size).items[0].digest() for kind, s, seed, size in variants}
    assert len(digests | {plain.items[0].digest()}) == 6
    assert corrupted(plain, "fog", 1).items[0].digest() in digests


def test_features_are_kept_by_corruption(tmp_path):
    backbone, plain = load_backbone(tiny_clip()), colours(2, seed=1)
    noisy = corrupted(plain, "contrast", 4)
    apart = [encode_images(backbone, data, cache=tmp_path).features for data in (plain, noisy)]
    assert (apart[0] - apart[1]).abs().max() > 1e-3
    again = encode_images(backbone, noisy, cache=tmp_path).features
    assert (again == apart[1]).all()


def test_large_images_shrink_first():
    data = Playground(size=96, kinds=("cat", "fish")).dataset(1)
    item = corrupted(data, "contrast", 1, size=40).items[0]
    assert item.open().size == (40, 40)
    assert corrupted(data, "contrast", 1, size=120).items[0].open().size == (96, 96)
    several = Playground(kinds=("cat", "fish")).multilabel(2, most=2)
    assert corrupted(several, "fog", 1).labels == several.labels


def test_features_cannot_be_corrupted():
    import torch

    item = FeatureItem("row 0", torch.ones(4))
    data = colours(1, seed=1).select([0])
    broken = corrupted(type(data)([item], [0], data.class_names), "fog", 1)
    with pytest.raises(DataError, match="no pixels"):
        broken.items[0].open()
