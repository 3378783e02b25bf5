"""`clipadapt adapt`: from a folder of images to a model that knows them. The main job."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clipadapt.cli.adaptation import Plan, adapt_to, check_target
from clipadapt.cli.console import AsJson, OnError, print_json
from clipadapt.cli.outcome import show
from clipadapt.cli.photos import MultiLabel, Photos, Root, read_multi_label, read_photos
from clipadapt.errors import ClipadaptError


def adapt(
    photos: Photos,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder to save the model to.", show_default="<PHOTOS>-adapted"),
    ] = None,
    shots: Annotated[int, typer.Option(min=1, help="Images per class to learn from.")] = 16,
    method: Annotated[
        str, typer.Option(metavar="KEY", help="A method's key (see `clipadapt methods`); auto compares them.")
    ] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter of --method; repeatable.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Hub id, folder or file of weights.", show_default="embedded")
    ] = None,
    templates: Annotated[
        str,
        typer.Option(
            help="A set of prompt templates, one template with {}, or a .txt, .json or .yaml file of templates or of "
            "each class's own sentences."
        ),
    ] = "photo",
    root: Root = None,
    multi_label: MultiLabel = False,
    unlabelled: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images without labels, for a --method that learns from them."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed that decides which images are drawn.")] = 1,
    budget: Annotated[float, typer.Option(min=0, help="Seconds that the comparison of methods may take.")] = 60.0,
    on_error: Annotated[OnError, typer.Option(help="What to do with an unreadable image.")] = OnError.RAISE,
    as_json: AsJson = False,
) -> None:
    """Adapt a model to PHOTOS, and say how good it is.

    A few images of each class are learned from. With `--method auto`, the methods that fit are compared by
    cross-validation among these, and the best is taken. The other images (at most 2,000; for a split file its
    test part) check the result. With `--multi-label` an image can show several classes, and mAP takes the place of
    accuracy. Running the same command again resumes an interrupted training run.
    """
    target = out or Path(f"{photos.resolve().stem}-adapted")
    check_target(target, photos)
    chosen = None
    if method != "auto":
        chosen = create_method(method, settings or [], templates)
    elif settings:
        raise typer.BadParameter("needs --method KEY: auto sets hyper-parameters by itself.", param_hint="--set")
    if unlabelled is not None and chosen is None:
        raise typer.BadParameter("needs --method KEY: auto learns from labels.", param_hint="--unlabelled")
    train, test = (read_multi_label(photos, root), None) if multi_label else read_photos(photos, root)
    plan = Plan(target, shots, chosen, backbone, templates, seed, budget, on_error.value, unlabelled)
    document = adapt_to(train, test, plan)
    if as_json:
        print_json(document)
    else:
        show(document, next_command=f"clipadapt predict {target} photo.jpg")


def create_method(key: str, settings: list[str], templates: str) -> Any:
    """The unfitted method with hyper-parameters from NAME=VALUE pairs."""
    from clipadapt.methods import create, method_class

    fields = {field.name: field for field in dataclasses.fields(method_class(key))}
    values: dict[str, Any] = {"templates": templates}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r} is not of the form NAME=VALUE.", param_hint="--set")
        values[name] = parse_value(f"{key}: {name}", text, fields[name].default) if name in fields else text
    return create(key, **values)


def parse_value(what: str, text: str, default: Any) -> Any:
    """`text` as a value of the default's type; if the default gives no type, as JSON or else as a string."""
    if isinstance(default, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(default))
    allowed = (int, float) if isinstance(default, float) else type(default)
    if wanted and not (isinstance(value, allowed) and isinstance(value, bool) == isinstance(default, bool)):
        raise ClipadaptError(f"{what} = {text} is not {wanted}.")
    return value
