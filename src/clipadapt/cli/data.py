"""`clipadapt data`: public data sets by name, and whether a folder holds one as published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipadapt.cli.console import AsJson, count_of, out, print_json, table

app = typer.Typer(help="Public data sets by name: what they are, and whether yours is complete.", no_args_is_help=True)


@app.command("list")
def list_data(as_json: AsJson = False) -> None:
    """The data sets that suites can name, with their licence and where to get them."""
    from clipadapt.data.definitions import definition, definitions

    known = [definition(name) for name in definitions()]
    if as_json:
        print_json([{f: getattr(d, f) for f in ("name", "title", "classes", "licence", "source")} for d in known])
        return
    drawn = table("name", "classes", "what it is", "licence", "where to get it", right=("classes",))
    for d in known:
        drawn.add_row(d.name, f"{d.classes:,}" if d.classes else "", d.title, d.licence, d.source or "generated")
    out.print(drawn)


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A data set's name, or the path of its YAML file.")],
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", envvar="CLIPADAPT_DATA", help="The folder that contains the data sets."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say exactly what is missing from DIR or differs from the data set NAME; exit code 1 if anything does."""
    from clipadapt.data import definitions

    what = definitions.definition(name)
    problems = definitions.check(what, folder)
    if as_json:
        print_json({"name": what.name, "complete": not problems, "problems": problems})
    else:
        for problem in problems:
            out.print(problem, markup=False, soft_wrap=True)
        if not problems:
            parts = definitions.load(what, folder).split
            counts = ", ".join(f"{part} {len(getattr(parts, part)):,}" for part in ("train", "val", "test"))
            out.print(f"{what.name} is complete: {counts}; {count_of(len(parts.test.class_names), 'class')}")
    if problems:
        raise typer.Exit(1)
