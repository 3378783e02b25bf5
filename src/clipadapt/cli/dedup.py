"""`clipadapt dedup`: duplicate images, and which of them to keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from clipadapt.cli import console
from clipadapt.cli.console import AsJson, count_of, err, note, out, with_old_key
from clipadapt.cli.index import Embedded
from clipadapt.cli.search import ToHtml

if TYPE_CHECKING:
    from clipadapt.search.duplicates import Group

SHOWN_GROUPS = 20


def dedup(
    embedded: Embedded,
    threshold: Annotated[
        float, typer.Option(metavar="COSINE", help="Cosine at or above which images count as duplicates.")
    ] = 0.95,
    as_list: Annotated[
        bool, typer.Option("--list", help="Print only the paths of images that could be removed, one per line.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help=f"Show all groups, not only {SHOWN_GROUPS}.")] = False,
    as_json: AsJson = False,
    html: ToHtml = None,
) -> None:
    """Find images in EMB that are the same or nearly the same, and say which to keep. Nothing is deleted.

    The largest image of each group is kept, and every other that is not itself similar enough to a kept one. Look at
    the page of --html before you delete anything: what counts as nearly the same differs from model to model.
    """
    with err.status("Opening the embeddings"):
        from clipadapt.embeddings import Embeddings
        from clipadapt.features.progress import progress_bar
        from clipadapt.search.duplicates import near_duplicates

        embeddings = Embeddings(embedded)
    with progress_bar("Comparing images", len(embeddings), True) as advance:
        groups = near_duplicates(embeddings, threshold, report=advance)
    copies = sum(len(group.copies) for group in groups)
    if html is not None:
        write_page(
            html,
            groups,
            f"{count_of(copies, 'image')} of {len(embeddings):,} could be removed (cosine of {threshold:g} or more).",
        )
    if as_json:
        console.print_json(
            {
                **with_old_key("images", len(embeddings)),
                "threshold": threshold,
                "copies": copies,
                "groups": list(map(document, groups)),
            }
        )
    elif as_list:
        print_list(groups)
    elif not groups:
        out.print(f"no duplicates among {count_of(len(embeddings), 'image')}")
    elif html is None:
        show(groups if every else groups[:SHOWN_GROUPS])
        if len(groups) > SHOWN_GROUPS and not every:
            out.print(f"and {count_of(len(groups) - SHOWN_GROUPS, 'group')} more; --all shows them", style="dim")
        out.print(f"{count_of(copies, 'image')} of {len(embeddings):,} could be removed; --list prints their paths")


def document(group: Group) -> dict[str, Any]:
    """A group as JSON values."""
    names = {kept.row: kept.name for kept in group.keep}
    return {
        "keep": [{"id": kept.row, "name": kept.name, "why": kept.why} for kept in group.keep],
        "copies": [
            {
                "id": copy.row,
                "name": copy.name,
                "like": names[copy.like],
                "similarity": copy.similarity,
                "same_content": copy.same_content,
            }
            for copy in group.copies
        ],
    }


def print_list(groups: list[Group]) -> None:
    """The copies' paths; one that breaks the line could be taken for two, and is left out."""
    for group in groups:
        for copy in group.copies:
            if len(copy.name.splitlines()) == 1:
                typer.echo(copy.name)
            else:
                note(f"omitted, as its name has a line break: {copy.name!r}; --json has it")


def show(groups: list[Group]) -> None:
    """A line for each image, what is kept in bold."""
    drawn = console.table("", "image", "cosine", "why", right=("cosine",))
    drawn.columns[1].overflow = "fold"
    for group in groups:
        for kept in group.keep:
            drawn.add_row("keep", Text(kept.name), "", kept.why, style="bold")
        for copy in group.copies:
            drawn.add_row("copy", Text(copy.name), f"{copy.similarity:.3f}", likeness(copy.same_content), style="dim")
        drawn.add_section()
    out.print(drawn)


def likeness(same_content: bool) -> str:
    """How a copy is like the kept image, in words."""
    return "same content" if same_content else "similar"


def write_page(file: Path, groups: list[Group], found: str) -> None:
    """A section for each group; what is kept is framed."""
    from clipadapt.search.sheet import Card, Section, write_sheet

    sections = []
    for number, group in enumerate(groups, start=1):
        kept = [Card(kept.name, [f"keep: {kept.why}"], marked=True) for kept in group.keep]
        others = [Card(c.name, [f"copy: {likeness(c.same_content)}, {c.similarity:.3f}"]) for c in group.copies]
        sections.append(Section([*kept, *others], f"Group {number}"))
    note(f"wrote {write_sheet(file, 'Duplicates', sections, found)}")
