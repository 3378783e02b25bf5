"""The few-shot loop: batches, schedule, clipping, reports, and randomness that stays inside."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipadapt.backbones import load_backbone
from clipadapt.errors import ArtifactError
from clipadapt.training.loop import Run, batches, seeded, stream, train
from clipadapt.training.pixels import Pixels
from clipadapt.training.search import best_on
from tests.images import colours
from tests.tiny import tiny_clip


def test_batches_hold_every_row_once_an_epoch():
    steps = batches(10, 4, epochs=3, seed=5)
    assert [len(rows) for rows in steps] == [4, 4, 2] * 3
    for epoch in range(3):
        assert sorted(torch.cat(steps[3 * epoch : 3 * epoch + 3]).tolist()) == list(range(10))
    assert [r.tolist() for r in steps] == [r.tolist() for r in batches(10, 4, epochs=3, seed=5)]
    assert [r.tolist() for r in steps] != [r.tolist() for r in batches(10, 4, epochs=3, seed=6)]


def test_train_is_gradient_descent():
    """x <- x - lr_t x on f(x) = x^2 / 2, with the rate of each step and everything reported."""
    x = torch.tensor([8.0], requires_grad=True)
    reports = []
    losses = train(
        lambda rows: (x**2 / 2).sum(),
        torch.optim.SGD([x], lr=0.5),
        [torch.arange(1)] * 3,
        schedule=lambda step: [1.0, 0.5, 0.0][step],
        run=Run(reports.append),
    )
    assert losses == [32.0, 8.0, 4.5]
    assert x.item() == 3.0
    assert [(r["step"], r["steps"], r["loss"], r["lr"]) for r in reports] == [
        (1, 3, 32.0, 0.5),
        (2, 3, 8.0, 0.25),
        (3, 3, 4.5, 0.0),
    ]


def test_the_gradient_is_clipped_as_a_whole():
    x, y = torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    train(lambda rows: (x**2 / 2 + y**2 / 2).sum(), torch.optim.SGD([x, y], lr=1.0), [torch.arange(1)], clip_norm=1.0)
    assert (x.item(), y.item()) == pytest.approx((3 - 0.6, 4 - 0.8), abs=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run():
    x = torch.tensor([1.0], requires_grad=True)
    with pytest.raises(FloatingPointError, match="at step 1: lower the learning rate"):
        train(lambda rows: (x / 0).sum(), torch.optim.SGD([x], lr=1.0), [torch.arange(1)])


def test_seeded_leaves_the_global_stream_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(7):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), expected)
    with seeded(7):
        assert torch.equal(torch.rand(2), first)


def test_the_first_of_equal_candidates_wins():
    labels = torch.tensor([0, 1])
    right, wrong = torch.eye(2), torch.eye(2).flip(0)
    assert best_on(labels, [("a", wrong), ("b", right), ("c", right)]) == ("b", 1.0)


def test_pixels_plain_and_cropped():
    backbone, data = load_backbone(tiny_clip()), colours(2, seed=3)
    plain = Pixels(backbone, data, min_scale=1.0, seed=1)
    expected = torch.stack([backbone.preprocess(item.open()) for item in data.items])
    assert torch.equal(plain.batch(torch.arange(8), 0), expected)
    assert torch.equal(plain.batch([5, 2], 9), expected[[5, 2]])
    cropped = Pixels(backbone, data, min_scale=0.3, seed=1)
    first, second = cropped.batch([0, 1], 0), cropped.batch([0, 1], 1)
    assert first.shape == (2, 3, 32, 32)
    assert not torch.equal(first, second)
    assert torch.equal(first, Pixels(backbone, data, min_scale=0.3, seed=1).batch([0, 1], 0))
    assert not torch.equal(first, Pixels(backbone, data, min_scale=0.3, seed=2).batch([0, 1], 0))


# -- interruption ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def descend(folder=None, stop_at: int | None = None, optimizer=torch.optim.SGD, **options) -> tuple[torch.Tensor, list]:
    """A little training run that draws random numbers, averages its weights, and may be interrupted after a step."""
    seen: list[dict] = []

    def report(line: dict) -> None:
        seen.append(line)
        if line["step"] == stop_at:
            raise Interrupted

    weights, average = torch.ones(3, requires_grad=True), torch.zeros(3)
    with seeded(1):
        losses = train(
            lambda rows: ((weights - rows.sum() - torch.rand(3)) ** 2).sum(),
            optimizer([weights], **options),
            batches(8, 2, epochs=3, seed=1),
            schedule=lambda step: 1 / (1 + step),
            run=Run(report, folder, every=0),
            after_step=lambda step: average.add_(weights.detach()),
            state=[average],
        )
    return torch.cat([weights.detach(), average, torch.tensor(losses)]), seen


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1}),
    ],
)
def test_an_interrupted_run_ends_as_if_nothing_had_happened(tmp_path, optimizer, options):
    whole, _ = descend(optimizer=optimizer, **options)
    with pytest.raises(Interrupted):
        descend(tmp_path, stop_at=5, optimizer=optimizer, **options)
    resumed, seen = descend(tmp_path, optimizer=optimizer, **options)
    assert torch.equal(resumed, whole)
    assert [line["step"] for line in seen] == list(range(5, 13))  # step 5 was interrupted before it was kept
    again, seen = descend(tmp_path, optimizer=optimizer, **options)  # a run that ended is not trained again
    assert torch.equal(again, whole)
    assert seen == []


def test_a_kept_run_of_something_else_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        descend(tmp_path, stop_at=5, lr=0.1)
    x = torch.zeros(4, requires_grad=True)
    with pytest.raises(ArtifactError, match=r"run-1.safetensors is damaged or belongs to another run"):
        train(lambda rows: x.sum(), torch.optim.SGD([x], lr=0.1), [0], run=Run(None, tmp_path))
    (tmp_path / "run-1.safetensors").write_bytes(b"half a file")
    with pytest.raises(ArtifactError, match="damaged"):
        descend(tmp_path, lr=0.1)


def test_a_run_whose_after_step_has_hidden_state_is_not_kept(tmp_path):
    x = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    train(lambda rows: x.sum(), optimizer, [0], run=Run(None, tmp_path, every=0), after_step=lambda step: None)
    assert not list(tmp_path.iterdir())


def test_accuracy_is_reported_where_the_loss_gives_it():
    x, seen = torch.zeros(1, requires_grad=True), []
    hits = iter([[True, False], [True, True]])
    train(lambda rows: (x.sum(), torch.tensor(next(hits))), torch.optim.SGD([x], lr=0.1), [0, 0], run=Run(seen.append))
    assert [line["accuracy"] for line in seen] == [0.5, 0.75]


def test_a_run_knows_how_many_numbers_were_trained():
    run = Run()
    assert run.trained == 0
    x, y = torch.zeros(3, 2, requires_grad=True), torch.zeros(5, requires_grad=True)
    groups = [{"params": [x]}, {"params": [y], "lr": 1.0}]
    train(lambda rows: x.sum() + y.sum(), torch.optim.SGD(groups, lr=0.1), [0], run=run)
    assert run.trained == 11


def test_the_stream_of_a_step_depends_on_seed_and_step_alone():
    expected = torch.rand(3, generator=torch.Generator().manual_seed(2 * 1_000_003 + 5))
    assert torch.equal(torch.rand(3, generator=stream(2, 5)), expected)
    assert not torch.equal(torch.rand(3, generator=stream(5, 2)), expected)


class Ahead:
    """Steps that are prepared as they are taken."""

    def __init__(self):
        self.first: list[int] = []

    def __len__(self):
        return 12

    def stream(self, first):
        self.first.append(first)
        yield from batches(8, 2, epochs=3, seed=1)[first:]


def test_steps_may_be_a_stream_that_goes_on_where_the_run_does(tmp_path):
    steps, x = Ahead(), torch.zeros(1, requires_grad=True)

    def descend_on(given, folder=None, report=None):
        x.data.fill_(1.0)
        train(lambda rows: ((x - rows.sum()) ** 2).sum(), torch.optim.SGD([x], lr=0.1), given,
              run=Run(report, folder, every=0))  # fmt: skip
        return x.detach().clone()

    def interrupt(line):
        if line["step"] == 5:
            raise Interrupted

    plain = descend_on(batches(8, 2, epochs=3, seed=1))
    with pytest.raises(Interrupted):
        descend_on(steps, tmp_path, interrupt)
    assert torch.equal(descend_on(steps, tmp_path), plain)
    assert steps.first == [0, 4]


def test_a_run_that_is_stopped_is_left_after_the_step_and_goes_on(tmp_path):
    whole, _ = descend(lr=0.1)
    run = Run(None, tmp_path, every=0)
    run.report = lambda line: setattr(run, "stopped", line["step"] == 5)
    weights, average = torch.ones(3, requires_grad=True), torch.zeros(3)
    with seeded(1):
        losses = train(
            lambda rows: ((weights - rows.sum() - torch.rand(3)) ** 2).sum(),
            torch.optim.SGD([weights], lr=0.1),
            batches(8, 2, epochs=3, seed=1),
            schedule=lambda step: 1 / (1 + step),
            run=run,
            after_step=lambda step: average.add_(weights.detach()),
            state=[average],
        )
    assert len(losses) == 5
    resumed, seen = descend(tmp_path, lr=0.1)
    assert torch.equal(resumed, whole)
    assert seen[0]["step"] == 6


def test_a_run_kept_before_the_one_format_goes_on(tmp_path):
    """Then the losses were in the header."""
    whole, _ = descend(lr=0.1)
    with pytest.raises(Interrupted):
        descend(tmp_path, stop_at=5, lr=0.1)
    file = tmp_path / "run-1.safetensors"
    tensors = load_file(file)
    losses = tensors.pop("losses").tolist()
    save_file(tensors, file, metadata={"progress": json.dumps({"losses": losses, "seconds": 1.0})})
    resumed, seen = descend(tmp_path, lr=0.1)
    assert torch.equal(resumed, whole)
    assert seen[0]["step"] == 5


def test_a_kept_run_of_another_number_of_tensors_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        descend(tmp_path, stop_at=5, lr=0.1)
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ArtifactError, match="belongs to another run"):
        train(lambda rows: x.sum(), torch.optim.SGD([x], lr=0.1), [0], run=Run(None, tmp_path))
