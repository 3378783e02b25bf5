"""`clipadapt evaluate`: how good is an adapted model on labelled pictures, and where does it err."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipadapt.cli import console
from clipadapt.cli.console import AsJson, OnError, counted, err, note, out
from clipadapt.cli.photos import Photos, Root, read_photos
from clipadapt.errors import unknown_name

if TYPE_CHECKING:
    from clipadapt.data import Dataset

SHOWN_CLASSES = 20


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that `clipadapt adapt` wrote.")],
    photos: Photos,
    root: Root = None,
    every: Annotated[
        bool, typer.Option("--all", help=f"Show all classes, not only the {SHOWN_CLASSES} worst.")
    ] = False,
    on_error: Annotated[OnError, typer.Option(help="What to do with an unreadable picture.")] = OnError.RAISE,
    as_json: AsJson = False,
) -> None:
    """Accuracy of MODEL on PHOTOS (of a split file its test part), class by class, and what it takes for what.

    Classes are matched by name; PHOTOS may hold fewer than the model knows.
    """
    pictures, test = read_photos(photos, root)
    data = pictures if test is None else test
    with err.status("Loading the model"):
        from clipadapt.methods import load

        fitted = load(model)
    labels = labels_among(fitted.class_names_, data)
    logits, kept = fitted.image_logits(data, on_error=on_error.value, progress=True)
    unreadable = [data.items[index].name for index in sorted(set(range(len(data))) - set(kept))]
    for name in unreadable:
        note(f"skipped: {name} cannot be read")
    document = {"model": str(model), "method": fitted.card.key, "data": data.name, "unreadable": unreadable}
    document |= measure([labels[index] for index in kept], logits.argmax(dim=1).numpy(), fitted.class_names_)
    if as_json:
        console.print_json(document)
    else:
        show(document, every)


def labels_among(class_names: list[str], data: Dataset) -> list[int]:
    """The data's labels as indices into the model's `class_names`."""
    if data.class_names == class_names:
        return data.labels
    used = {data.class_names[label] for label in data.labels}
    unknown = sorted(used - set(class_names))
    if unknown:
        raise unknown_name("class of this model", unknown[0], class_names)
    return [class_names.index(data.class_names[label]) for label in data.labels]


def measure(labels: list[int], predicted: Any, class_names: list[str]) -> dict[str, Any]:
    """The figures of the document; classes with pictures only, the worst first."""
    from clipadapt.evaluation.metrics import accuracy, confusion_pairs, macro_accuracy, per_class, wilson

    correct = int((predicted == labels).sum())
    scores = [score for score in per_class(labels, predicted, class_names) if score.recall is not None]
    scores.sort(key=lambda score: (score.recall, -score.support))
    return {
        "pictures": len(labels),
        "accuracy": accuracy(labels, predicted),
        "interval": wilson(correct, len(labels)),
        "macro_accuracy": macro_accuracy(labels, predicted),
        "classes": [
            {"class": s.name, "pictures": s.support, "accuracy": s.recall, "precision": s.precision, "f1": s.f1}
            for s in scores
        ],
        "confusions": [
            {"true": true, "predicted": taken_for, "count": count}
            for true, taken_for, count in confusion_pairs(labels, predicted, class_names)
        ],
    }


def show(document: dict[str, Any], every: bool) -> None:
    """The headline, the table of classes, and the mistakes."""
    classes = document["classes"]
    out.print(
        f"accuracy [bold]{console.percent(document['accuracy'])}[/] "
        f"(95 % interval {console.interval(document['interval'])}) on {counted(document['pictures'], 'picture')}\n"
        f"mean of {counted(len(classes), 'class')}: {console.percent(document['macro_accuracy'])}"
    )
    right = ("pictures", "accuracy", "precision", "F1")
    drawn = console.table("class", *right, right=right)
    shown = classes if every else classes[:SHOWN_CLASSES]
    for row in shown:
        figures = [console.percent(row[name]) for name in ("accuracy", "precision", "f1")]
        drawn.add_row(row["class"], f"{row['pictures']:,}", *figures)
    out.print(drawn)
    if len(shown) < len(classes):
        out.print(f"{counted(len(classes) - len(shown), 'class')} did better; --all shows them.", style="dim")
    if document["confusions"]:
        mistakes = console.table("true class", "taken for", "times", right=("times",))
        for row in document["confusions"]:
            mistakes.add_row(row["true"], row["predicted"], str(row["count"]))
        out.print(mistakes)
