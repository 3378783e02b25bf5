"""The outcome of `adapt` and `demo` as tables: how the methods compare, how good the model is, where it was saved."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from clipadapt.cli import console
from clipadapt.cli.console import count_of, out

ACCURACY = {"accuracy": "accuracy", "interval": "95 % interval"}


def show(document: dict[str, Any], next_command: str) -> None:
    """The document as tables, where the model was saved, and what to type next."""
    if document["trials"]:
        out.print(comparison_table(document))
        out.print(f"Chosen: {document['reason']}.", markup=False)
        reasons = dict.fromkeys(skipped["reason"] for skipped in document["not_tried"])
        for reason in reasons:
            methods = ", ".join(s["method"] for s in document["not_tried"] if s["reason"] == reason)
            out.print(f"Not tried: {methods}: {reason.rstrip('.')}.", style="dim", markup=False)
    else:
        seconds, parameters = console.duration(document["fit_seconds"]), document["trained_parameters"]
        out.print(f"{document['method']}: fitted in {seconds}, {count_of(parameters, 'trained parameter')}.")
    if document["held_out"] is None:
        out.print("No images are left to check the model on; use fewer --shots to leave some.")
    else:
        out.print()
        out.print(held_out_table(document))
    out.print(f"Model saved to [bold]{document['model']}[/] ({console.size(document['bytes'])}). Next:")
    out.print(f"  {next_command}", style="cyan", markup=False, soft_wrap=True)


def comparison_table(document: dict[str, Any]) -> Table:
    """Zero-shot and each method: accuracy across the folds of the support set."""
    measure = "mAP" if document["data"]["multi_label"] else "accuracy"
    right = (measure, "95 % interval", "seconds", "trained parameters")
    title = f"Cross-validation within the {count_of(document['data']['support'], 'image')} learned from"
    drawn = console.table("", "method", *right, right=right, title=title)
    for trial in document["trials"]:
        drawn.add_row(
            "→" if trial["chosen"] else "",
            trial["method"],
            console.percent(trial["accuracy"]),
            console.interval(trial["interval"]),
            f"{trial['seconds']:.1f}",
            f"{trial['trained_parameters']:,}",
            style="bold green" if trial["chosen"] else None,
        )
    return drawn


def held_out_table(document: dict[str, Any]) -> Table:
    """Zero-shot and the adapted model on images that neither has seen."""
    held_out = document["held_out"]
    columns = {"mAP": "mAP", "OF1": "OF1", "CF1": "CF1"} if document["data"]["multi_label"] else ACCURACY
    title = f"Check on {count_of(held_out['images'], 'held-out image')}"
    drawn = console.table("model", *columns.values(), right=tuple(columns.values()), title=title)
    for name, key in (("zero-shot", "zero_shot"), (f"adapted ({document['method']})", "adapted")):
        figures = [
            console.interval(held_out[key][c]) if c == "interval" else console.percent(held_out[key][c])
            for c in columns
        ]
        drawn.add_row(name, *figures)
    return drawn
