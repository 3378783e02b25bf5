"""`clipadapt pretrain`: build the corpus of named images, and train a small CLIP on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Train a small CLIP on images and parts that anyone can download.", no_args_is_help=True)

Archives = Annotated[
    Path | None, typer.Option("--from", help="Folder of packages fetched before; missing ones are added.")
]


@app.command()
def corpus(
    out: Annotated[Path, typer.Argument(help="Folder to build the corpus in.")],
    archives: Archives = None,
    playground: Annotated[int, typer.Option(help="Images of the playground to draw.")] = 22_000,
    workers: Annotated[int | None, typer.Option(help="Processes that draw; default: one per core.")] = None,
) -> None:
    """Fetch icon sets, annotations and clip art, and draw them into OUT (about 4.6 GB)."""
    from clipadapt.data.corpus.pairs import build_corpus

    build_corpus(out, archives=archives, playground=playground, workers=workers, report=typer.echo)


@app.command()
def prepare(
    corpus: Annotated[Path, typer.Argument(help="Folder built by `clipadapt pretrain corpus`.")],
    archives: Archives = None,
    views: Annotated[int, typer.Option(help="Random views of each drawing that are kept.", min=1)] = 1,
) -> None:
    """Make in CORPUS the model to begin with, the lessons of its text tower, and the patches that its trunk gives.

    Needs packages that are fetched with pip, apt and git. Given again, it goes on where it was interrupted.
    """
    from clipadapt.training.embedded.prepare import prepare

    prepare(corpus, archives or corpus / "archives", views=views, report=typer.echo)


@app.command()
def run(
    corpus: Annotated[Path, typer.Argument(help="Folder built by `clipadapt pretrain corpus`.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run there is resumed.")],
    recipe: Annotated[Path, typer.Option(help="JSON file with the keys of Recipe, and preset, vocabulary.")],
    steps: Annotated[int | None, typer.Option(help="Length of the run, instead of the recipe's.")] = None,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Each of several processes holds its share of the weights (FSDP2).")
    ] = False,
) -> None:
    """Train a CLIP on CORPUS by a recipe; the weights are in OUT/model at any time (a plain transformers folder)."""
    from clipadapt.backbones.scratch import new_backbone
    from clipadapt.backbones.vocabulary import train_tokenizer
    from clipadapt.data.corpus.pairs import Corpus
    from clipadapt.evaluation.studies.pretraining import corpus_hooks
    from clipadapt.training.contrastive import train_contrastive
    from clipadapt.training.recipe import Recipe

    values = read_recipe(recipe)
    sizes = {"preset": values.pop("preset", "small"), "seed": values.get("seed", 0)}
    vocabulary = values.pop("vocabulary", 6144)
    if steps is not None:
        values["steps"] = steps
    source = Corpus.open(corpus)
    tokenizer = train_tokenizer(source.training_texts(), vocabulary)
    backbone = new_backbone(sizes["preset"], tokenizer=tokenizer, seed=sizes["seed"])
    hooks = corpus_hooks(source, backbone.image_size[0])
    plan = Recipe.from_dict(values)
    train_contrastive(
        backbone,
        source,
        plan,
        out,
        hooks=hooks,
        on_log=_tell,
        sharded=sharded or None,
    )
    typer.echo(f"The model is in {out / 'model'}")


@app.command()
def embedded(
    corpus: Annotated[Path, typer.Argument(help="Folder that `clipadapt pretrain prepare` has filled.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run there is resumed.")],
    recipe: Annotated[Path, typer.Option(help='JSON file: two recipes, "text" and "together".')],
    archives: Archives = None,
) -> None:
    """Make the embedded model: teach its text tower, then train both towers; it is in OUT/together/model in the end."""
    from clipadapt.backbones import load_backbone
    from clipadapt.data.corpus.pairs import Corpus
    from clipadapt.errors import ClipadaptError
    from clipadapt.evaluation.studies.pretraining import corpus_hooks
    from clipadapt.training.contrastive import train_contrastive
    from clipadapt.training.embedded.lessons import Lessons, taught
    from clipadapt.training.embedded.patches import KeptPatches
    from clipadapt.training.embedded.prepare import photo_files, wordnet
    from clipadapt.training.embedded.together import Together, together
    from clipadapt.training.recipe import Recipe

    stages = read_recipe(recipe)
    for name in ("text", "together"):
        if name not in stages:
            raise ClipadaptError(f'{recipe} lacks "{name}", the recipe of a stage.')
    first, second = (Recipe.from_dict(stages[name]) for name in ("text", "together"))
    archives = archives or corpus / "archives"
    lessons, images, kept = Lessons.open(corpus / "lessons"), Corpus.open(corpus), KeptPatches.open(corpus / "patches")

    start = load_backbone(corpus / "start")
    hooks = corpus_hooks(images, start.image_size[0], trunk=start)
    taught_model = train_contrastive(start, lessons, first, out / "text", objective=taught, hooks=hooks, on_log=_tell)
    senses = wordnet(archives).senses
    source = Together(images, kept, lessons, [senses[one] for one in photo_files(archives)])
    train_contrastive(taught_model, source, second, out / "together", objective=together, hooks=hooks, on_log=_tell)
    typer.echo(f"The model is in {out / 'together' / 'model'}")


def _tell(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record))


def read_recipe(file: Path) -> dict[str, Any]:
    """The recipe's values; raises ClipadaptError naming the file when it cannot be read or is not JSON."""
    from clipadapt.errors import ClipadaptError

    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClipadaptError(f"The recipe {file} cannot be read: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise ClipadaptError(f"The recipe {file} is not JSON: {error}.") from None
