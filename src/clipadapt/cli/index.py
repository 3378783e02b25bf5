"""`clipadapt index`: embeddings into a vector store, for searches among millions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipadapt.cli.console import count_of, err, out

Embedded = Annotated[Path, typer.Argument(metavar="EMB", help="A folder that `clipadapt embed` wrote.")]


def index(
    embedded: Embedded,
    store: Annotated[str, typer.Option(help="usearch, lance, qdrant, pgvector, or exact (no store).")] = "usearch",
    to: Annotated[
        str | None,
        typer.Option(
            metavar="LOCATION",
            help="A folder, or the URL of a server (qdrant, pgvector).",
            show_default="a folder in EMB",
        ),
    ] = None,
) -> None:
    """Put the embeddings EMB into a vector store; `clipadapt search` then uses it.

    Without a store, searches are exact and need no extra package, which is fast enough up to about a million images.
    An interrupted build is never used, and the same command resumes it. `--store exact` undoes the indexing.
    """
    with err.status("Opening the embeddings"):
        from clipadapt.embeddings import Embeddings
        from clipadapt.features.progress import progress_bar
        from clipadapt.search.index import build_index

        total = len(Embeddings(embedded))
    with progress_bar("Indexing images", total, True) as advance:
        built = build_index(embedded, store, to, report=advance)
    if store == "exact":
        out.print(f"{embedded} is searched exactly, without a store.", markup=False, soft_wrap=True)
    else:
        place = f"{embedded}/index-{store}" if to is None else to
        where = "" if "://" in place else f" in {place}"  # a URL can hold a password
        out.print(
            f"{count_of(total, 'image')} {'indexed' if built else 'indexed already'}{where} ({store})",
            markup=False,
            soft_wrap=True,
        )
