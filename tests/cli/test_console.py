"""Figures the way people read them, and the live line of training."""

import io

import pytest
from rich.console import Console

from clipadapt.cli import console


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (console.percent(0.9123), "91.2 %"),
        (console.percent(None), "–"),
        (console.interval((0.9012, 0.9218)), "90.1–92.2"),
        (console.interval(None), "–"),
        (console.duration(0.4213), "0.42 s"),
        (console.duration(12.34), "12.3 s"),
        (console.duration(200), "3 min 20 s"),
        (console.size(640), "640 bytes"),
        (console.size(12_345), "12 kB"),
        (console.size(3_400_000), "3.4 MB"),
        (console.count_of(1, "class"), "1 class"),
        (console.count_of(2000, "class"), "2,000 classes"),
        (console.count_of(0, "image"), "0 images"),
    ],
)
def test_figures(shown, expected):
    assert shown == expected


def test_training_shows_step_loss_and_rate_on_a_terminal_only(monkeypatch):
    shown = {}
    for terminal in (True, False):
        screen = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        monkeypatch.setattr(console, "err", screen)
        with console.training_progress("Fitting coop") as report:
            report({"step": 30, "steps": 40, "loss": 0.1234, "lr": 0.1, "seconds": 2.0})
        shown[terminal] = screen.file.getvalue()
    for part in ("Fitting coop", "30/40", "loss 0.123", "15.0 steps/s"):
        assert part in shown[True]
    assert shown[False].strip() == ""
