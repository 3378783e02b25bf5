"""MoCo v3 and AugMix views: drawn from their generator alone, mild where they should be, mixed as the paper says."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image

from clipadapt.features.augmentations import augmix, moco_v3


def image_of(seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((60, 48), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)


def test_moco_views():
    image = image_of()
    views = [moco_v3(image, random.Random(seed)) for seed in range(300)]
    assert {(view.size, view.mode) for view in views} == {((60, 48), "RGB")}
    again = moco_v3(image, random.Random(7))
    assert again.tobytes() == views[7].tobytes()
    assert len({view.tobytes() for view in views}) > 220  # a fifth have only the blur, slight in so small an image
    grey = [np.ptp(np.asarray(view), axis=2).max() == 0 for view in views]
    assert 0.1 < np.mean(grey) < 0.3
    brightness = np.array([np.asarray(view).mean() for view in views]) / np.asarray(image).mean()
    assert brightness.min() > 0.5
    assert brightness.max() < 1.5
    assert image.tobytes() == image_of().tobytes()


def test_augmix_is_a_mild_convex_mix():
    image = image_of()
    plain = pixels(image)
    views = [augmix(image, pixels, random.Random(seed)) for seed in range(100)]
    assert all(view.shape == plain.shape and view.min() >= 0 and view.max() <= 1 for view in views)
    torch.testing.assert_close(augmix(image, pixels, random.Random(7)), views[7], rtol=0, atol=0)
    distances = torch.stack([(view - plain).abs().mean() for view in views])
    assert 0.005 < distances.mean() < 0.1
    # an affine preprocessing commutes with the mix, since its weights sum to one
    shifted = augmix(image, lambda im: 3 * pixels(im) - 1, random.Random(7))
    torch.testing.assert_close(shifted, 3 * views[7] - 1)
    flat = Image.new("RGB", (32, 32), (90, 90, 90))
    steady = augmix(flat, lambda im: torch.ones(3, 2, 2), random.Random(1))
    torch.testing.assert_close(steady, torch.ones(3, 2, 2))
