"""Objectives: terms are summed and reported, and gradients that the loss leaves itself are taken as they are."""

from __future__ import annotations

import pytest
import torch

from clipadapt.training.loop import Run, train
from clipadapt.training.objective import detached, total


def test_terms_are_summed():
    terms = {"labels": torch.tensor(1.0, requires_grad=True), "texts": torch.tensor(2.5)}
    assert total(terms).item() == 3.5
    assert total(terms["labels"]) is terms["labels"]
    assert {name: term.requires_grad for name, term in detached(terms).items()} == {"labels": False, "texts": False}
    assert not detached(terms["labels"]).requires_grad


def test_train_sums_and_reports_terms_by_name():
    x, seen = torch.tensor([8.0], requires_grad=True), []

    def loss_of(_):
        return {"half": (x**2 / 2).sum(), "line": 2 * x.sum()}, torch.tensor([True, False])

    losses = train(loss_of, torch.optim.SGD([x], lr=0.5), range(2), run=Run(seen.append))
    assert losses == [48.0, 10.5]  # x: 8, 3
    assert x.item() == 3.0 - 0.5 * 5.0
    assert [line["terms"] for line in seen] == [{"half": 32.0, "line": 16.0}, {"half": 4.5, "line": 6.0}]
    assert [line["accuracy"] for line in seen] == [0.5, 0.5]


def test_a_loss_without_a_graph_has_left_the_gradients_itself():
    x = torch.tensor([8.0], requires_grad=True)

    def loss_of(_):
        loss = (x**2 / 2).sum()
        loss.backward()
        return loss.detach()

    assert train(loss_of, torch.optim.SGD([x], lr=0.5), range(3)) == [32.0, 8.0, 2.0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        train(lambda _: torch.tensor(1.0), torch.optim.SGD([x], lr=0.5), range(1))
