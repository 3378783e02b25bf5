"""Mixup on the hypersphere and its losses, each against a plain computation; alignment and uniformity."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.losses.contrastive import info_nce
from clipadapt.losses.geodesic import (
    alignment,
    both_modal_mixup,
    lerp,
    multi_modal_mixup,
    slerp,
    uni_modal_mixup,
    uniformity,
)


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    image, text = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    return normalize(image, dim=1), normalize(text, dim=1)


def plain_slerp(a: torch.Tensor, b: torch.Tensor, weight: float) -> torch.Tensor:
    """Turn b towards a in their plane, by the share `weight` of the angle between them."""
    a, b = a.double(), b.double()
    angle = math.acos(float(a @ b))
    across = a - (a @ b) * b
    return math.cos(weight * angle) * b + math.sin(weight * angle) * across / across.norm()


def nll(scores: list[float], target: list[float]) -> float:
    log_sum = math.log(sum(math.exp(s) for s in scores))
    return -sum(t * (s - log_sum) for s, t in zip(scores, target, strict=True))


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_slerp_walks_the_great_circle(pairs, weight):
    a, b = pairs
    mixed = slerp(a, b, weight)
    torch.testing.assert_close(mixed.norm(dim=1), torch.ones(6))
    expected = torch.stack([plain_slerp(x, y, weight) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(mixed.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(slerp(b, a, 1 - weight), mixed, atol=1e-5, rtol=0)
    assert (lerp(a, b, weight).norm(dim=1) <= 1 + 1e-6).all()


def test_slerp_of_equal_rows_is_the_row_with_finite_gradients():
    a = normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), dim=1).requires_grad_()
    mixed = slerp(a, a.detach().clone(), 0.3)
    torch.testing.assert_close(mixed, a, atol=1e-6, rtol=0)
    mixed.sum().backward()
    assert torch.isfinite(a.grad).all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_multi_modal_mixup_is_its_definition(pairs, weight):
    image, text = pairs
    total = 0.0
    for anchor in (image, text):
        for i in range(6):
            scores = [
                8.0 * float(image[i] @ text[i])
                if i == j
                else 8.0 * float(anchor[i].double() @ plain_slerp(image[j], text[j], weight))
                for j in range(6)
            ]
            total += nll(scores, [float(i == j) for j in range(6)])
    assert abs(float(multi_modal_mixup(image, text, weight, 8.0)) - total / 12) < 1e-5


def test_multi_modal_mixup_at_its_ends(pairs):
    """Unmixed negatives: those of the own modality for one tower, those of plain InfoNCE for the other."""
    image, text = pairs
    own, target = torch.eye(6, dtype=torch.bool), torch.arange(6)
    cosines = {("i", "t"): image @ text.T, ("i", "i"): image @ image.T, ("t", "i"): text @ image.T}
    cosines["t", "t"] = text @ text.T
    for weight, other in ((0.0, "t"), (1.0, "i")):
        losses = [
            torch.nn.functional.cross_entropy(
                8 * torch.where(own, cosines["i", "t"].diagonal()[:, None], cosines[anchor, other]), target
            )
            for anchor in "it"
        ]
        torch.testing.assert_close(multi_modal_mixup(image, text, weight, 8.0), sum(losses) / 2)


def test_mixed_negatives_are_harder():
    """Where the modalities lie apart, as in CLIP, a mixed negative is nearer than one of the other modality."""
    generator = torch.Generator().manual_seed(2)
    image = normalize(torch.randn(32, 16, generator=generator) + 3 * torch.eye(16)[0], dim=1)
    text = normalize(torch.randn(32, 16, generator=generator) + 3 * torch.eye(16)[1], dim=1)
    losses = [float(multi_modal_mixup(image, text, 0.5, 8.0, mix)) for mix in (slerp, lerp)]
    assert losses[0] > float(info_nce(image, text, 8.0)) + 0.3
    assert losses[0] > losses[1], "inside the sphere cosines are smaller"


@pytest.mark.parametrize("size", [5, 6])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_uni_modal_mixup_is_its_definition(pairs, weight, size):
    image, text = (rows[:size] for rows in pairs)
    mixed = [
        image[i].double() if i == size - 1 - i else plain_slerp(image[i], image[size - 1 - i], weight)
        for i in range(size)
    ]
    scores = [[8.0 * float(mixed[i] @ text[j].double()) for j in range(size)] for i in range(size)]
    target = [[weight * (i == j) + (1 - weight) * (j == size - 1 - i) for j in range(size)] for i in range(size)]
    rows = sum(nll(scores[i], target[i]) for i in range(size))
    columns = sum(nll([scores[i][j] for i in range(size)], [target[i][j] for i in range(size)]) for j in range(size))
    assert abs(float(uni_modal_mixup(image, text, weight, 8.0)) - (rows + columns) / 2 / size) < 1e-5
    if weight == 1:
        torch.testing.assert_close(uni_modal_mixup(image, text, 1.0, 8.0), info_nce(image, text, 8.0))
        torch.testing.assert_close(uni_modal_mixup(text, image, 1.0, 8.0), info_nce(image, text, 8.0))


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_both_modal_mixup_is_its_definition(pairs, weight):
    image, text = pairs
    images, texts = ([plain_slerp(rows[i], rows[5 - i], weight) for i in range(6)] for rows in pairs)
    total = 0.0
    for i in range(6):
        target = [float(i == j) + float(j == 5 - i) for j in range(6)]
        total += nll([8.0 * float(images[i] @ texts[j]) for j in range(6)], target)
        total += nll([8.0 * float(images[j] @ texts[i]) for j in range(6)], target)
    assert abs(float(both_modal_mixup(image, text, weight, 8.0)) - total / 12) < 1e-5


def test_one_pair_costs_nothing_and_repeated_texts_have_gradients():
    one = normalize(torch.randn(1, 5), dim=1)
    for loss in (multi_modal_mixup, uni_modal_mixup, both_modal_mixup):
        assert abs(float(loss(one, one, 0.3, 8.0))) < 1e-6
        rows = normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(3)), dim=1)
        image, text = rows.clone().requires_grad_(), rows[[0, 0, 0, 0]].clone().requires_grad_()
        loss(image, text, 0.3, 8.0).backward()
        assert torch.isfinite(image.grad).all()
        assert torch.isfinite(text.grad).all()


def test_alignment_and_uniformity(pairs):
    image, text = pairs
    expected = sum(float((image[i] - text[i]) @ (image[i] - text[i])) for i in range(6)) / 6
    assert abs(float(alignment(image, text)) - expected) < 1e-5
    assert float(alignment(image, image)) == 0
    assert abs(float(alignment(image, -image)) - 4) < 1e-5
    values = [math.exp(-2 * float((image[i] - image[j]).square().sum())) for i in range(6) for j in range(i)]
    assert abs(float(uniformity(image)) - math.log(sum(values) / len(values))) < 1e-5
    assert abs(float(uniformity(image[[0, 0, 0]]))) < 1e-5, "all in one place"
    assert float(uniformity(torch.eye(5))) == pytest.approx(-4)
