"""`clipadapt clusters`: what kinds of pictures there are, before anybody has looked at them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from clipadapt.cli import console
from clipadapt.cli.console import AsJson, counted, err, note, out
from clipadapt.cli.index import Embedded
from clipadapt.cli.search import ToHtml

EXAMPLES = 12  # pictures of a group on the page


def clusters(
    embedded: Embedded,
    k: Annotated[
        int | None, typer.Option("--k", min=2, help="How many groups.", show_default="by number of pictures")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Words to name groups by, one a line.", show_default="common things"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed can give other groups.")] = 1,
    as_json: AsJson = False,
    html: ToHtml = None,
) -> None:
    """Divide the pictures in EMB into groups of similar ones, and name each by the words that tell it from the others.

    Names come from a list of words by the model that the pictures were embedded with; they are a hint, no label.
    """
    with err.status("Grouping pictures"):
        from clipadapt.search import Index, find_clusters, name_clusters, read_words

        words = read_words(names)
        index = Index.open(embedded)
        groups = find_clusters(index.embeddings, k, seed=seed)
        titles = name_clusters(groups, index.model, words)
    if html is not None:
        from clipadapt.search.sheet import Card, Section, write_sheet

        sections = [
            Section(
                [
                    Card(hit.name, [f"{hit.score:.3f}"])
                    for hit in index.hits(group.rows[:EXAMPLES], group.scores[:EXAMPLES])
                ],
                ", ".join(title),
                counted(len(group.rows), "picture"),
            )
            for group, title in zip(groups, titles, strict=True)
        ]
        found = f"{counted(len(index), 'picture')} in {counted(len(groups), 'group')}; the nearest to each middle."
        note(f"wrote {write_sheet(html, 'Groups', sections, found)}")
    if as_json:
        names_of = index.embeddings.names
        document: dict[str, Any] = {"pictures": len(index), "seed": seed}
        document["clusters"] = [
            {"words": title, "size": len(group.rows), "pictures": [names_of[row] for row in group.rows]}
            for group, title in zip(groups, titles, strict=True)
        ]
        console.print_json(document)
    elif html is None:
        drawn = console.table("group", "pictures", "nearest to its middle", right=("pictures",))
        drawn.columns[2].overflow = "fold"
        for group, title in zip(groups, titles, strict=True):
            examples = [hit.name for hit in index.hits(group.rows[:2], group.scores[:2])]
            drawn.add_row(Text(", ".join(title)), f"{len(group.rows):,}", Text("\n".join(examples), style="dim"))
        out.print(drawn)
