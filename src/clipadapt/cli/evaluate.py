"""`clipadapt evaluate`: how good an adapted model is on labelled images, and which classes it confuses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from clipadapt.cli import console
from clipadapt.cli.console import AsJson, OnError, count_of, err, note, out, with_old_key
from clipadapt.cli.photos import Photos, Root, read_multi_label, read_photos
from clipadapt.errors import DataError, unknown_name

if TYPE_CHECKING:
    from clipadapt.data import Dataset, MultiLabelDataset

SHOWN_CLASSES = 20


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that `clipadapt adapt` wrote.")],
    photos: Photos,
    root: Root = None,
    every: Annotated[
        bool, typer.Option("--all", help=f"Show all classes, not only the {SHOWN_CLASSES} worst.")
    ] = False,
    on_error: Annotated[OnError, typer.Option(help="What to do with an unreadable image.")] = OnError.RAISE,
    as_json: AsJson = False,
) -> None:
    """Accuracy of MODEL on PHOTOS (the test part of a split file), class by class, and its most frequent mistakes.

    For a multi-label model: mAP and F1 on a table of images with sets of labels.

    Classes are matched by name; PHOTOS may hold fewer than the model knows.
    """
    with err.status("Loading the model"):
        from clipadapt.methods import load

        fitted = load(model)
    if fitted.multi_label_:
        evaluate_sets(model, fitted, read_multi_label(photos, root), every, on_error.value, as_json)
        return
    images, test = read_photos(photos, root)
    data = images if test is None else test
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


def evaluate_sets(model: Path, fitted: Any, data: MultiLabelDataset, every: bool, on_error: str, as_json: bool) -> None:
    """mAP, OF1, CF1, and each class's average precision, the worst first."""
    from clipadapt.metrics.multilabel import average_precision, f1_scores, mean_average_precision

    targets, names = data.targets, fitted.class_names_
    unknown = [name for name in data.class_names if name not in names]
    if unknown:
        raise unknown_name("class of this model", unknown[0], names)
    if not targets.any():
        raise DataError(f"{data.name}: no image has any label, so there is nothing to evaluate.")
    logits, kept = fitted.image_logits(data, on_error=on_error, progress=True)
    scores, targets = logits[:, [names.index(name) for name in data.class_names]], targets[kept]
    f1, precisions = f1_scores(targets, scores >= fitted.threshold_), average_precision(targets, scores)
    order = sorted((p, name) for p, name in zip(precisions.tolist(), data.class_names, strict=True) if p == p)
    counts = dict(zip(data.class_names, targets.sum(0).tolist(), strict=True))
    document = {
        "model": str(model),
        "method": fitted.card.key,
        "data": data.name,
        "unreadable": [data.items[index].name for index in sorted(set(range(len(data))) - set(kept))],
        **with_old_key("images", len(kept)),
        "mAP": mean_average_precision(targets, scores),
        "OF1": f1.overall,
        "CF1": f1.per_class,
        "classes": [
            {"class": name, **with_old_key("images", counts[name]), "average_precision": p} for p, name in order
        ],
    }
    if as_json:
        console.print_json(document)
        return
    figures = ", ".join(f"{name} {console.percent(document[name])}" for name in ("mAP", "OF1", "CF1"))
    out.print(f"{figures} on {count_of(len(kept), 'image')}")
    drawn = console.table("class", "images", "average precision", right=("images", "average precision"))
    for row in document["classes"] if every else document["classes"][:SHOWN_CLASSES]:
        drawn.add_row(Text(row["class"]), f"{row['images']:,}", console.percent(row["average_precision"]))
    out.print(drawn)


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
    """The figures of the document; classes with images only, the worst first."""
    from clipadapt.metrics.classification import accuracy, confusion_pairs, macro_accuracy, per_class, wilson

    correct = int((predicted == labels).sum())
    scores = [score for score in per_class(labels, predicted, class_names) if score.recall is not None]
    scores.sort(key=lambda score: (score.recall, -score.support))
    return {
        **with_old_key("images", len(labels)),
        "accuracy": accuracy(labels, predicted),
        "interval": wilson(correct, len(labels)),
        "macro_accuracy": macro_accuracy(labels, predicted),
        "classes": [
            {
                "class": s.name,
                **with_old_key("images", s.support),
                "accuracy": s.recall,
                "precision": s.precision,
                "f1": s.f1,
            }
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
        f"(95 % interval {console.interval(document['interval'])}) on {count_of(document['images'], 'image')}\n"
        f"mean of {count_of(len(classes), 'class')}: {console.percent(document['macro_accuracy'])}"
    )
    right = ("images", "accuracy", "precision", "F1")
    drawn = console.table("class", *right, right=right)
    shown = classes if every else classes[:SHOWN_CLASSES]
    for row in shown:
        figures = [console.percent(row[name]) for name in ("accuracy", "precision", "f1")]
        drawn.add_row(Text(row["class"]), f"{row['images']:,}", *figures)
    out.print(drawn)
    if len(shown) < len(classes):
        out.print(f"{count_of(len(classes) - len(shown), 'class')} did better; --all shows them.", style="dim")
    if document["confusions"]:
        mistakes = console.table("true class", "taken for", "times", right=("times",))
        for row in document["confusions"]:
            mistakes.add_row(Text(row["true"]), Text(row["predicted"]), str(row["count"]))
        out.print(mistakes)
