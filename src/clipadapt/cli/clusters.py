"""`clipadapt clusters`: what kinds of images there are, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from clipadapt.cli import console
from clipadapt.cli.console import AsJson, count_of, err, note, out, with_old_key
from clipadapt.cli.index import Embedded
from clipadapt.cli.search import ToHtml

EXAMPLES = 12  # images of a group on the page


def clusters(
    embedded: Embedded,
    k: Annotated[
        int | None, typer.Option("--k", min=2, help="How many groups.", show_default="by number of images")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Words to name groups by, one per line.", show_default="common things"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed can give other groups.")] = 1,
    as_json: AsJson = False,
    html: ToHtml = None,
) -> None:
    """Divide the images in EMB into groups of similar ones, and name each by the words that distinguish it.

    The model that embedded the images chooses the names from a list of words; they are hints, not labels.
    """
    with err.status("Grouping images"):
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
                count_of(len(group.rows), "image"),
            )
            for group, title in zip(groups, titles, strict=True)
        ]
        found = f"{count_of(len(index), 'image')} in {count_of(len(groups), 'group')}; those nearest to each centre."
        note(f"wrote {write_sheet(html, 'Groups', sections, found)}")
    if as_json:
        names_of = index.embeddings.names
        document: dict[str, Any] = {**with_old_key("images", len(index)), "seed": seed}
        document["clusters"] = [
            {
                "words": title,
                "size": len(group.rows),
                **with_old_key("images", [names_of[row] for row in group.rows]),
            }
            for group, title in zip(groups, titles, strict=True)
        ]
        console.print_json(document)
    elif html is None:
        drawn = console.table("group", "images", "nearest to its centre", right=("images",))
        drawn.columns[2].overflow = "fold"
        for group, title in zip(groups, titles, strict=True):
            examples = [hit.name for hit in index.hits(group.rows[:2], group.scores[:2])]
            drawn.add_row(Text(", ".join(title)), f"{len(group.rows):,}", Text("\n".join(examples), style="dim"))
        out.print(drawn)
