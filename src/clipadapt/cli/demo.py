"""`clipadapt demo`: the main job on pictures that are already there, scikit-learn's handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipadapt.cli.adaptation import Plan, adapt_to, check_target
from clipadapt.cli.console import AsJson, print_json
from clipadapt.cli.outcome import show

if TYPE_CHECKING:
    from clipadapt.data import Dataset

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the model goes.")] = Path("digits-adapted"),
    as_json: AsJson = False,
) -> None:
    """Adapt the embedded model to 160 handwritten digits. Needs no download and less than a minute."""
    check_target(out)
    train, test = handwritten_digits().split(test=0.3, seed=1)
    document = adapt_to(train, test, Plan(out, templates="a picture of the digit {}.", budget=20))
    if as_json:
        print_json(document)
    else:
        show(document, next_command="clipadapt adapt PHOTOS        # your own: a folder with one sub-folder per class")


def handwritten_digits() -> Dataset:
    """1,797 scans of 8 x 8 grey values (E. Alpaydin and C. Kaynak, UCI 1998), as dark ink on white paper."""
    from sklearn.datasets import load_digits

    from clipadapt.data import image_list

    digits = load_digits()
    ink = 255 - (digits.images * (255 / 16)).round()  # (N, 8, 8), values 0..16 -> 255..0
    return image_list(ink.astype("uint8"), digits.target, DIGITS, name="handwritten digits")
