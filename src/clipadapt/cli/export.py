"""`clipadapt export`: an adapted model for other programs, as ONNX or as a plain transformers folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipadapt.cli import console
from clipadapt.cli.console import AsJson, count_of, err, note, out
from clipadapt.cli.evaluate import labels_among
from clipadapt.cli.photos import read_photos
from clipadapt.errors import ClipadaptError

if TYPE_CHECKING:
    from clipadapt.data import Dataset


class Format(StrEnum):
    """What to write."""

    ONNX = "onnx"
    TRANSFORMERS = "transformers"


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that `clipadapt adapt` wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    form: Annotated[
        Format,
        typer.Option("--format", help="ONNX graphs with the head inside, or the changed towers for transformers."),
    ] = Format.ONNX,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also 8-bit graphs, smaller and less exact; --data measures how much.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(metavar="PHOTOS", help="Labelled images to compare the exported model on.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the images of a split file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write MODEL to OUT for use without clipadapt.

    ONNX graphs are checked against the model before they are kept. 8 bits cost accuracy: --int8 needs --data to
    measure how much.
    """
    if int8 and data is None:
        raise ClipadaptError("--int8 changes predictions: give --data PHOTOS, labelled images to measure how much.")
    if int8 and form is not Format.ONNX:
        raise ClipadaptError("--int8 needs --format onnx.")
    images = None
    if data is not None:
        whole, test = read_photos(data, root)
        images = whole if test is None else test
    with err.status("Loading the model"):
        from clipadapt.methods import load

        fitted = load(model)
    if form is Format.TRANSFORMERS:
        if fitted.kind != "weights":
            raise ClipadaptError(
                f"{fitted.card.key} changes no weights of the towers, so there is only its backbone to write; "
                "--format onnx includes the head."
            )
        fitted.export(folder)
        out.print(f"{folder}: towers as a plain transformers folder", markup=False, soft_wrap=True)
        return
    from clipadapt.serve.onnx import export_onnx

    with err.status("Exporting"):
        export_onnx(fitted, folder, int8=int8)
    document: dict[str, Any] = {"model": str(model), "onnx": str(folder), "method": fitted.card.key}
    document["bytes"] = {file.name: file.stat().st_size for file in sorted(folder.glob("*.onnx"))}
    if images is not None:
        document["compared"] = compare(fitted, folder, images, int8)
    if as_json:
        console.print_json(document)
        return
    for name, size in document["bytes"].items():
        out.print(f"{folder / name}: {size / 1e6:.1f} MB", markup=False, soft_wrap=True)
    if not (folder / "text.onnx").exists():
        note("no text.onnx: this model encodes texts with learned prompts, and its classes are in the head")
    if images is not None:
        show(document["compared"], len(images))


def compare(fitted: Any, folder: Path, data: Dataset, int8: bool) -> list[dict[str, Any]]:
    """Accuracy of the model and of each exported form, and how often a form names the same class as the model."""
    import numpy as np
    import torch

    from clipadapt.serve.onnx import OnnxModel

    labels = np.array(labels_among(fitted.class_names_, data))
    pixels = torch.stack([fitted.backbone_.preprocess(item.open()) for item in data.items])
    predicted = {"torch": fitted.image_logits(pixels)[0].argmax(1).numpy()}
    for name in ("onnx", "int8")[: 1 + int8]:
        predicted[name] = OnnxModel(folder, int8=name == "int8").run(pixels)[1].argmax(1)
    return [
        {
            "form": name,
            "accuracy": float((classes == labels).mean()),
            "same_class": float((classes == predicted["torch"]).mean()),
        }
        for name, classes in predicted.items()
    ]


def show(rows: list[dict[str, Any]], images: int) -> None:
    """A table, and the loss in one sentence."""
    drawn = console.table("run by", "accuracy", "same class as torch", right=("accuracy", "same class as torch"))
    for row in rows:
        drawn.add_row(row["form"], console.percent(row["accuracy"]), console.percent(row["same_class"]))
    out.print(drawn)
    if rows[-1]["form"] == "int8":
        lost = 100 * (rows[0]["accuracy"] - rows[-1]["accuracy"])
        out.print(f"8 bits {'cost' if lost >= 0 else 'gained'} {abs(lost):.1f} points on {count_of(images, 'image')}")
