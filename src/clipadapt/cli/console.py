"""How the commands talk: results on stdout, everything else on stderr, and figures in readable form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


class OnError(StrEnum):
    """What to do with an image that cannot be read."""

    RAISE = "raise"
    SKIP = "skip"


def note(text: str) -> None:
    """Print a remark on stderr."""
    err.print(text, style="dim", markup=False, soft_wrap=not err.is_terminal)


def print_json(document: Any) -> None:
    """One JSON document on stdout, indented."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def with_old_key(key: str, value: Any) -> dict[str, Any]:
    """The field `image` or `images` of a JSON document, and the same under its old name for scripts that read that."""
    return {key: value, key.replace("image", "picture"): value}


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """An empty table with light lines; the columns in `right` hold figures."""
    drawn = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title=title, title_style="", title_justify="left"
    )
    for name in columns:
        figures = name in right
        drawn.add_column(name, justify="right" if figures else "left", no_wrap=figures)
    return drawn


def percent(share: float | None) -> str:
    """0.912 -> "91.2 %"; an undefined share is a dash."""
    return "–" if share is None else f"{100 * share:.1f} %"


def interval(bounds: tuple[float, float] | None) -> str:
    """(0.901, 0.922) -> "90.1–92.2"; for an undefined share, a dash."""
    return "–" if bounds is None else f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}"


def duration(seconds: float) -> str:
    """Seconds as "0.42 s", "12.3 s" or "3 min 20 s"."""
    if seconds >= 100:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def size(count: int) -> str:
    """Bytes as "640 bytes", "12 kB" or "3.4 MB" (powers of 1,000)."""
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def count_of(number: int, noun: str) -> str:
    """(1, "image") -> "1 image"; (2000, "class") -> "2,000 classes"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


@contextmanager
def training_progress(title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A live line on a terminal: loss, accuracy on the support set, step, rate, time left.

    Gives the `report` function that `Method.fit` takes. The accuracy is that of the latest batches.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]:.3f}{task.fields[right]}"),
        TextColumn("{task.fields[rate]:.1f} steps/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None, visible=False, loss=0.0, right="", rate=0.0)

        def report(step: dict[str, Any]) -> None:
            rate = step["step"] / max(step["seconds"], 1e-9)
            right = f"  support {percent(step['accuracy'])}" if "accuracy" in step else ""
            bar.update(
                task,
                completed=step["step"],
                total=step["steps"],
                loss=step["loss"],
                right=right,
                rate=rate,
                visible=True,
            )

        yield report
