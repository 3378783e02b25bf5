"""`clipadapt methods`: the catalogue, from the methods' own cards."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from clipadapt.cli import console
from clipadapt.cli.console import AsJson, count_of, out
from clipadapt.errors import ClipadaptError

SIGNALS = {"none": "class names", "labels": "labels", "unlabelled": "unlabelled images", "pairs": "captions"}


def methods(
    pattern: Annotated[
        str, typer.Argument(metavar="[GLOB]", help='Keys to list, such as "*adapter*"; an exact key shows its details.')
    ] = "*",
    as_json: AsJson = False,
) -> None:
    """List the methods, or show one with its hyper-parameters."""
    from clipadapt.methods import list_methods
    from clipadapt.methods.registry import card

    keys = list_methods(pattern)
    if not keys:
        if set("*?[") & set(pattern):
            raise ClipadaptError(f"No method's key matches {pattern!r}; `clipadapt methods` lists them all.")
        card(pattern)  # raises the error that names the nearest keys
    if as_json:
        console.print_json([entry(key) for key in keys])
    elif keys == [pattern]:
        show_one(entry(pattern))
    else:
        show_all([facts_of(key) for key in keys])


def facts_of(key: str) -> dict[str, Any]:
    """A method's card as JSON values; the method itself, and so torch, is not imported."""
    from clipadapt.methods.registry import card

    facts = dataclasses.asdict(card(key))
    return facts | {"requires": sorted(facts["requires"])}


def entry(key: str) -> dict[str, Any]:
    """A method's card and hyper-parameters as JSON values."""
    from clipadapt.methods import method_class
    from clipadapt.methods.card import settings_of

    cls = method_class(key)
    parameters = []
    for name, field in settings_of(cls).items():
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        known = {fact: field.metadata.get(fact) for fact in ("doc", "low", "high", "choices")}
        parameters.append({"name": name, "default": default, **known})
    summary = (cls.__doc__ or "").strip().split("\n")[0]
    return {**facts_of(key), "summary": summary, "hyperparameters": parameters}


def show_all(entries: list[dict[str, Any]]) -> None:
    """The keys by family, each with its paper and requirements."""
    by_family = sorted(entries, key=lambda card: (card["family"], card["key"]))
    for family, members in groupby(by_family, key=lambda card: card["family"]):
        out.print(f"\n{family}", style="bold cyan", markup=False)
        drawn = Table.grid(padding=(0, 2))
        drawn.add_column(no_wrap=True, style="bold", min_width=14)
        for card in members:
            drawn.add_row(card["key"], f"{escape(card['title'])}\n[dim]{escape(facts(card))}[/]")
        out.print(Padding(drawn, (0, 0, 0, 2)))
    out.print(f"\n{count_of(len(entries), 'method')}; clipadapt methods KEY shows one.", style="dim", markup=False)


def facts(card: dict[str, Any]) -> str:
    """What a method trains, learns from and needs, in one line."""
    parts = [f"arXiv {card['arxiv']}"] if card["arxiv"] else []
    parts += [f"trains {card['trains'] or 'nothing'}", f"from {SIGNALS.get(card['signal'], card['signal'])}"]
    if card["unlabelled"] and card["signal"] == "labels":
        parts[-1] += " or unlabelled images"
    if card["requires"]:
        parts.append(f"needs {', '.join(card['requires'])}")
    return " · ".join(parts)


def show_one(card: dict[str, Any]) -> None:
    """The card, and a table of hyper-parameters."""
    out.print(f"[bold]{card['key']}[/]  {card['summary']}")
    out.print(f"{card['title']} ({card['family']}, {card['problem']})", markup=False)
    out.print(facts(card), style="dim", markup=False)
    drawn = console.table("hyper-parameter", "default", "values", "meaning")
    drawn.columns[0].no_wrap = True
    for parameter in card["hyperparameters"]:
        drawn.add_row(parameter["name"], value_text(parameter["default"]), value_range(parameter), parameter["doc"])
    out.print(drawn)


def value_text(value: Any) -> str:
    """A default as typed after `--set name=`."""
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def value_range(parameter: dict[str, Any]) -> str:
    """The values a hyper-parameter may take."""
    low, high, choices = parameter["low"], parameter["high"], parameter["choices"]
    if choices is not None:
        return ", ".join(map(str, choices))
    if low is None and high is None:
        return ""
    if low is None or high is None:
        return f"≥ {low}" if high is None else f"≤ {high}"
    return f"{low} to {high}"
