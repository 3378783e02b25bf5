"""`clipadapt demo`: the main job on scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipadapt.cli.adaptation import Plan, adapt_to, check_target
from clipadapt.cli.console import AsJson, print_json
from clipadapt.cli.outcome import show


def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to save the model to.")] = Path("digits-adapted"),
    as_json: AsJson = False,
) -> None:
    """Adapt the embedded model to 160 handwritten digits. Needs no download and less than a minute."""
    from clipadapt.data.digits import handwritten_digits

    check_target(out)
    train, test = handwritten_digits().split(test=0.3, seed=1)
    document = adapt_to(train, test, Plan(out, templates="a picture of the digit {}.", budget=20))
    if as_json:
        print_json(document)
    else:
        show(document, next_command="clipadapt adapt PHOTOS        # your own: a folder with one sub-folder per class")
