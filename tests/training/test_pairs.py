"""Batches of a set of pairs in memory."""

from __future__ import annotations

import pytest
import torch

from clipadapt.data import image_pairs
from clipadapt.errors import ClipadaptError
from clipadapt.training.pairs import DrawnPairs
from tests.images import colours


@pytest.fixture
def pairs():
    items = colours(4, seed=1).items[:11]
    return image_pairs([(item, [f"{number} a", f"{number} b"]) for number, item in enumerate(items)])


def number_of(image) -> torch.Tensor:
    """Something small that tells images apart."""
    return torch.tensor(list(image.resize((1, 1)).getpixel((0, 0))), dtype=torch.float32)


def test_each_epoch_shows_other_pairs_in_a_fresh_order_with_drawn_captions(pairs):
    source = DrawnPairs(pairs, number_of)
    known = torch.stack([number_of(item.open()) for item in pairs.items])  # (11, 3)
    orders, captions = [], set()
    for epoch in range(8):
        order = []
        for place in range(2):
            images, texts = source.batch(2 * epoch + place, 5, 0, seed=3)
            rows = [int(text.split()[0]) for text in texts]
            assert torch.equal(images, known[rows]), "an image and its own caption"
            order += rows
            captions |= set(texts)
        assert len(set(order)) == 10
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 8
    assert len(captions) == 22, "in the end all captions of all images"


def test_a_batch_depends_on_step_and_seed_alone(pairs):
    def texts(step, seed):
        return DrawnPairs(pairs, number_of).batch(step, 5, 0, seed)[1]

    assert texts(3, 1) == texts(3, 1)
    assert texts(3, 1) != texts(3, 2)
    with pytest.raises(ClipadaptError, match=r"11 images, 22 captions\) are fewer than the 12 of a batch"):
        DrawnPairs(pairs, number_of).batch(0, 12, 0, 1)
