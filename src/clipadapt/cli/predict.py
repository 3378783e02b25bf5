"""`clipadapt predict`: what an adapted model sees in images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from clipadapt.cli import console
from clipadapt.cli.console import count_of, err, out
from clipadapt.errors import DataError


def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that `clipadapt adapt` wrote.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="Images, or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line, one line per image.")
    ] = False,
) -> None:
    """Name the most probable classes of FILES; for a multi-label model, the classes present, at most --top of them.

    An image that cannot be read is reported; the others are still predicted, and the exit code is 1.
    """
    paths = image_paths(files)
    with err.status("Loading the model"):
        from clipadapt.methods import load

        fitted = load(model)
    logits, kept = fitted.image_logits(paths, on_error="skip", progress=True)
    best, classes = fitted.probabilities(logits).topk(min(top, logits.shape[1]))  # (M, top)
    predictions: dict[int, list[dict[str, Any]]] = {
        index: [
            {"class": fitted.class_names_[label], "probability": probability}
            for label, probability in zip(labels, probabilities, strict=True)
            if not fitted.multi_label_ or probability >= 0.5
        ]
        for index, labels, probabilities in zip(kept, classes.tolist(), best.tolist(), strict=True)
    }
    unreadable = {index: reason_of(path) for index, path in enumerate(paths) if index not in predictions}

    if as_json:
        for index, path in enumerate(paths):
            answer = {"error": unreadable[index]} if index in unreadable else {"predictions": predictions[index]}
            typer.echo(json.dumps({"file": path, **answer}, ensure_ascii=False))
    elif predictions:
        show([(paths[index], classes) for index, classes in predictions.items()])
    for reason in unreadable.values():
        err.print(reason, style="red", markup=False, soft_wrap=True)
    if unreadable:
        err.print(f"{count_of(len(unreadable), 'image')} of {len(paths):,} could not be read")
        raise typer.Exit(1)


def image_paths(files: list[Path]) -> list[str]:
    """The files, and in place of each folder the images in it and below."""
    from clipadapt.data import image_files

    paths: list[str] = []
    for file in files:
        found = image_files(file) if file.is_dir() else [str(file)]
        if not found:
            raise DataError(f"The folder {file} holds no images.")
        paths += found
    return paths


def reason_of(path: str) -> str:
    """Why an image could not be read."""
    from clipadapt.data import FileItem

    try:
        FileItem(path).open()
    except DataError as error:
        return str(error)
    return f"{path} could not be read before, but can now."


def show(rows: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """A line for each class of each image."""
    drawn = console.table("image", "class", "probability", right=("probability",))
    drawn.columns[0].overflow = "fold"
    for path, classes in rows:
        if not classes:
            drawn.add_row(Text(path), "none of the classes", "", style="dim")
        for place, guess in enumerate(classes):
            first = place == 0
            cells = Text(path if first else ""), Text(guess["class"]), console.percent(guess["probability"])
            drawn.add_row(*cells, style="bold" if first else "dim")
    out.print(drawn)
