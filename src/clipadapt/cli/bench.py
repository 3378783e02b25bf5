"""`clipadapt bench`: methods on data sets by protocols, as a suite says; results as JSON lines and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipadapt.cli.console import AsJson, count_of, err, note, out, print_json, table
from clipadapt.errors import ClipadaptError

Data = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", envvar="CLIPADAPT_DATA", help="Folder of the data sets that consist of files."),
]


def bench(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="A shipped suite's name (`--list` shows them) or a YAML file.")
    ] = "",
    out_folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where results.jsonl and report.html go.")
    ] = None,
    data: Data = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="The suite's small version, minutes at most.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads per cell; by default the cores are divided evenly.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: its address, auto, or local.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="CELL", help="Run this cell again, by its name in the results.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html and its tables.")] = True,
    list_suites: Annotated[bool, typer.Option("--list", help="Show the shipped suites and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run SUITE and report on it. Results already in DIR are kept, so the same command resumes after a stop."""
    from clipadapt.evaluation.bench.run import run_suite
    from clipadapt.evaluation.bench.suite import cells, load_suite, suites
    from clipadapt.evaluation.report.page import check_installed, write_report

    if list_suites:
        drawn = table("suite", "title", "cells", "data", right=("cells",))
        for name in suites():
            found = load_suite(name)
            drawn.add_row(name, found.title, f"{len(cells(found)):,}", ", ".join(found.data))
        out.print(drawn)
        return
    if not suite:
        raise ClipadaptError("Which suite? `clipadapt bench --list` shows those that are shipped.")
    if out_folder is None:
        raise ClipadaptError("Say where the results go: --out DIR.")
    chosen = load_suite(suite, tiny=tiny)
    if report:
        check_installed()  # now, not after the run

    def tell(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    rows = run_suite(chosen, out_folder, root=data, jobs=jobs, threads=threads, ray=ray, only=only, tell=tell)
    failed, results = [row for row in rows if "error" in row], out_folder / "results.jsonl"
    if report and only is None:
        page = write_report(rows, out_folder, title=chosen.title, command=_command(suite, out_folder, tiny))
        note(f"report: {page}")
    if as_json:
        print_json({"suite": chosen.name, "results": str(results), "cells": len(rows), "failed": len(failed)})
    else:
        out.print(f"{count_of(len(rows), 'cell')}, {len(failed)} failed; {results}")


def _command(suite: str, out_folder: Path, tiny: bool) -> str:
    return f"clipadapt bench {suite} --out {out_folder.name}" + " --tiny" * tiny
