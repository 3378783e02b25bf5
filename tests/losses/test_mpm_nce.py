"""MPM-NCE equals its definition pair by pair, and InfoNCE in the limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from clipadapt.losses.contrastive import info_nce
from clipadapt.losses.mpm_nce import mpm_nce


def features(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, size, 5, generator=generator)
    return normalize(image, dim=1), normalize(text, dim=1)


def slow(image, text, labels, scale, margin, smoothing) -> float:
    size, total = len(labels), 0.0
    for i in range(size):
        positives = [j for j in range(size) if labels[j] == labels[i]]
        negatives = [j for j in range(size) if labels[j] != labels[i]]
        for anchor, others in ((image, text), (text, image)):
            scores = [scale * (float(anchor[i] @ others[j]) + (0 if j in positives else margin)) for j in range(size)]
            log_sum = math.log(sum(math.exp(s) for s in scores))
            share = smoothing if negatives else 0.0
            for j in range(size):
                target = (1 - share) / len(positives) if j in positives else share / len(negatives)
                total -= target * (scores[j] - log_sum)
    return total / size / 2


@pytest.mark.parametrize("labels", [[0, 1, 2, 1, 0, 0], [3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize(("margin", "smoothing"), [(0.0, 0.0), (0.05, 0.02), (0.1, 0.0), (0.0, 0.3)])
def test_it_is_the_definition(labels, margin, smoothing):
    image, text = features(6)
    ours = mpm_nce(image, text, torch.tensor(labels), 10.0, margin=margin, smoothing=smoothing)
    assert abs(float(ours) - slow(image, text, labels, 10.0, margin, smoothing)) < 1e-5


def test_without_margin_and_repetition_it_is_info_nce():
    image, text = features(7, seed=1)
    ours = mpm_nce(image, text, torch.arange(7), 22.5)
    torch.testing.assert_close(ours, info_nce(image, text, 22.5))


def test_repeated_captions_no_longer_fight():
    """InfoNCE pushes a picture away from the captions of its own class, here it is drawn to all of them alike."""
    image = text = torch.eye(3).repeat_interleave(2, 0)  # (6, 3)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert abs(float(mpm_nce(image, text, labels, 50.0)) - math.log(2)) < 1e-4, "the entropy of the target"
    cosines = (image @ text.T + 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    # both losses only see cosines: these stand for pictures, and a basis for the texts
    mpm_nce(cosines, torch.eye(6), labels, 5.0).backward()
    plain = cosines.grad.clone()
    cosines.grad = None
    info_nce(cosines, torch.eye(6), 5.0).backward()
    same = (labels[:, None] == labels) & ~torch.eye(6, dtype=torch.bool)
    assert (cosines.grad[same] > 0).all(), "InfoNCE pushes pictures away from the captions of their own class"
    assert plain[same].mean() < cosines.grad[same].mean() - 0.05


def test_a_margin_asks_for_more():
    image, text = features(6)
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    losses = [float(mpm_nce(image, text, labels, 10.0, margin=margin)) for margin in (0.0, 0.1, 0.2)]
    assert losses == sorted(losses)
    assert losses[0] < losses[2]


def test_one_pair_and_one_class_have_finite_gradients():
    for size in (1, 3):
        image, text = features(size)
        image.requires_grad_()
        loss = mpm_nce(image, text, torch.zeros(size, dtype=torch.long), 10.0, margin=0.1, smoothing=0.1)
        loss.backward()
        assert torch.isfinite(image.grad).all()
        assert size > 1 or loss.item() == 0
