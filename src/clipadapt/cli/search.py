"""`clipadapt search`: find images by words, by images, by both, or by a class of an adapted model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from clipadapt.cli import console
from clipadapt.cli.console import AsJson, count_of, err, note, out, with_old_key
from clipadapt.cli.index import Embedded

if TYPE_CHECKING:
    from clipadapt.search import Hit, Index

ToHtml = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page with the images, for any browser.")
]


def search(
    embedded: Embedded,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="What images should show.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="An image they should resemble; repeatable.")
    ] = None,
    minus: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What they should not show; repeatable.")
    ] = None,
    weights: Annotated[
        list[float] | None,
        typer.Option(
            "--weight", help="One for each TEXT, then each --image, then each --minus.", show_default="1 each"
        ),
    ] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", metavar="NAME", help="A class of the adapted model, instead of a TEXT.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="An adapted model.", show_default="the one that EMB was made with"),
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="CONDITION", help='Only images that meet this condition: "year > 2020".')
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many images to show.")] = 20,
    as_json: AsJson = False,
    html: ToHtml = None,
) -> None:
    """Find the images in EMB that fit best.

    The score is the cosine with what is searched for; with --class it is the probability by the model's classifier.
    Scores rank images; what counts as a high score differs from model to model, and between text and image
    queries.
    """
    check_query(texts or [], images or [], minus or [], weights or [], class_name)
    with err.status("Loading the model"):
        from clipadapt.search import Index, query_vector

        index = Index.open(embedded, model)
        searched = index.model
    if model is not None:
        note(what_changes(index, model))
    if class_name is not None:
        hits = index.search_class(class_name, top, where)
        asked = f"class {class_name}"
    else:
        parts = [*(texts or []), *map(str, images or []), *(minus or [])]
        weighted = list(zip(parts, weights or [1.0] * len(parts), strict=True))
        wanted, unwanted = len(texts or []), len(texts or []) + len(images or [])
        with err.status("Searching"):
            vector = query_vector(searched, weighted[:wanted], weighted[wanted:unwanted], weighted[unwanted:])
            (hits,) = index.search(vector[None], top, where)
        asked = ", ".join([*parts[:unwanted], *(f"not {text}" for text in minus or [])])
    answer(index, hits, asked, where, class_name is not None, as_json, html)


def check_query(texts: list[str], images: list[Path], minus: list[str], weights: list[float], name: str | None) -> None:
    """Refuse a command line that asks for nothing, or for two things at once."""
    parts = len(texts) + len(images) + len(minus)
    if name is not None and (parts or weights):
        raise typer.BadParameter("cannot be combined with TEXT, --image, --minus or --weight.", param_hint="--class")
    if name is None and not parts:
        raise typer.BadParameter("give a TEXT, an --image or a --class.", param_hint="TEXT")
    if weights and len(weights) != parts:
        raise typer.BadParameter(
            f"give one for each TEXT, --image and --minus, in this order: {parts}, not {len(weights)}.",
            param_hint="--weight",
        )
    if any(not 0 < weight < float("inf") for weight in weights):
        raise typer.BadParameter("weights must be positive, including those of --minus.", param_hint="--weight")


def what_changes(index: Index, folder: Path) -> str:
    """What an adapted model changes in a search whose images need not be embedded again."""
    if index.adapts_texts:
        return f"images need not be embedded again: {folder} changes texts only"
    return f"images need not be embedded again: {folder} changes neither images nor texts; --class uses its classifier"


def answer(
    index: Index, hits: list[Hit], asked: str, where: str | None, probable: bool, as_json: bool, html: Path | None
) -> None:
    """The hits as JSON, as a page, or as a table."""
    searched = f"{count_of(len(index), 'image')}" + (f" where {where}" if where else "")
    if html is not None:
        from clipadapt.search.sheet import Card, Section, write_sheet

        cards = [Card(hit.name, [f"{hit.rank}. {figure(hit.score, probable)}", *facts_of(hit, where)]) for hit in hits]
        page = write_sheet(html, asked, [Section(cards)], f"The best {len(hits):,} of {searched}.")
        note(f"wrote {page}")
    if as_json:
        console.print_json(
            {
                "query": asked,
                "where": where,
                **with_old_key("images", len(index)),
                "store": index.kind,
                "hits": list(map(vars, hits)),
            }
        )
    elif not hits:
        out.print(f"nothing found among {searched}", markup=False)
    elif html is None:
        score = "probability" if probable else "score"
        drawn = console.table("", score, "image", "", right=(score,))
        drawn.columns[2].overflow = "fold"
        for hit in hits:
            facts = ", ".join(facts_of(hit, where))
            drawn.add_row(str(hit.rank), figure(hit.score, probable), Text(hit.name), Text(facts, style="dim"))
        out.print(drawn)


def figure(score: float, probable: bool) -> str:
    """A score as text: a probability in per cent, a cosine with three decimals."""
    return console.percent(score) if probable else f"{score:.3f}"


def facts_of(hit: Hit, where: str | None) -> list[str]:
    """The facts that a condition speaks of."""
    return [f"{name} {value}" for name, value in hit.facts.items() if where and name in where and value is not None]
