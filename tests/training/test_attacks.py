"""PGD: inside the ball and inside [0, 1], equal to a loop written out, and worse for the classifier step by step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from clipadapt.backbones import load_backbone
from clipadapt.errors import BackboneError
from clipadapt.training.attacks import LEVEL, PixelSpace, pgd
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny_clip())


@pytest.fixture(scope="module")
def task(backbone):
    """Scores of plain images, 8 plain images, their labels."""
    data = colours(2, seed=1)
    space = PixelSpace.of(backbone)
    texts = backbone.encode_texts([f"a photo of a {name}." for name in data.class_names]).detach()
    plain = space.plain(torch.stack([backbone.preprocess(item.open()) for item in data.items]))
    return lambda x: 20 * backbone.encode_images(space.pixels(x)) @ texts.T, plain, torch.tensor(data.labels)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pixel_space(backbone):
    image = colours(1, seed=1).items[0].open()
    space, pixels = PixelSpace.of(backbone), backbone.preprocess(image)[None]
    plain = space.plain(pixels)
    values = torch.tensor(list(image.get_flattened_data())).T.reshape(1, 3, 32, 32)  # the tiny model keeps 32 x 32
    torch.testing.assert_close(plain, values / 255, atol=1e-6, rtol=0)
    torch.testing.assert_close(space.pixels(plain), pixels, atol=1e-6, rtol=0)
    unscaled = backbone.copy()
    unscaled.preprocess = replace(backbone.preprocess, rescale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = unscaled.preprocess(image)[None]
    torch.testing.assert_close(PixelSpace.of(unscaled).plain(pixels), plain, atol=1e-6, rtol=0)
    unscaled.preprocess = lambda image: backbone.preprocess(image)
    with pytest.raises(BackboneError, match="does not say how it normalises"):
        PixelSpace.of(unscaled)


@pytest.mark.parametrize("eps", [1.0, 8.0, 100.0])
def test_stays_in_the_ball_and_in_the_range(task, eps):
    scores, plain, labels = task
    attacked = pgd(scores, plain, labels, eps=eps * LEVEL, step_size=eps * LEVEL, steps=3, generator=generator())
    assert not attacked.requires_grad
    assert (attacked - plain).abs().max() <= eps * LEVEL + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - plain).abs().mean() > eps * LEVEL / 4


def test_equals_a_plain_loop(task):
    scores, plain, labels = task
    eps, size = 3 * LEVEL, 1 * LEVEL
    ours = pgd(scores, plain, labels, eps=eps, step_size=size, steps=4, generator=generator(5))
    delta = eps * (2 * torch.rand(plain.shape, generator=generator(5)) - 1)
    delta = torch.clamp(delta, 0 - plain, 1 - plain)
    for _ in range(4):
        x = (plain + delta).requires_grad_()
        cross_entropy(scores(x), labels).backward()
        delta = torch.clamp(delta + size * x.grad.sign(), -eps, eps)
        delta = torch.clamp(delta, 0 - plain, 1 - plain)
    torch.testing.assert_close(ours, plain + delta, atol=1e-6, rtol=0)


def test_the_loss_rises_with_the_steps(task):
    scores, plain, labels = task
    losses = [
        cross_entropy(scores(pgd(scores, plain, labels, eps=8 * LEVEL, step_size=LEVEL, steps=k)), labels).item()
        for k in range(1, 9)
    ]
    plainly = cross_entropy(scores(plain), labels).item()
    assert losses[0] > plainly
    assert all(after > before - 1e-3 for before, after in pairwise(losses))
    assert losses[-1] > losses[0]


def test_no_radius_no_change(task):
    scores, plain, labels = task
    assert torch.equal(pgd(scores, plain, labels, eps=0.0, step_size=LEVEL, steps=2, generator=generator()), plain)


def test_depends_on_the_generator_alone_and_leaves_no_gradient(task):
    scores, plain, labels = task
    weight = torch.ones(4, requires_grad=True)

    def weighed(x):
        return scores(x) * weight

    with torch.no_grad():  # a caller's own setting does not matter
        first, again, other = (
            pgd(weighed, plain, labels, eps=LEVEL, step_size=LEVEL / 2, steps=1, generator=generator(seed))
            for seed in (1, 1, 2)
        )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert weight.grad is None
