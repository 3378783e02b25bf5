"""`clipadapt embed`: images to a folder of embeddings, in parts that any number of machines can make."""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from clipadapt.cli.console import AsJson, OnError, count_of, duration, err, note, out, print_json, with_old_key


def embed(
    photos: Annotated[
        str,
        typer.Argument(
            metavar="PHOTOS",
            help="A folder of images; a .csv, .tsv or .parquet table with the column image; WebDataset .tar shards "
            "(* and {000..123} are wildcards); a .txt list of paths and URLs; or the URL of any of these.",
        ),
    ],
    target: Annotated[str, typer.Option("--out", metavar="EMB", help="Folder or URL to save the parts to.")],
    backbone: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Hub id, folder or file of weights.", show_default="embedded")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Encode as this adapted model does, instead of a backbone.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Make only part I of N, counted from 0; others make the rest.")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Parts to make; by default at most 100,000 images each, or one per .tar.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes, each with its own model.")] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Workers on a Ray cluster: its address, auto, or local.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, …")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Images that go through the model at once.")] = 64,
    fast_decode: Annotated[
        bool, typer.Option("--fast-decode", help="Decode large JPEGs at reduced size; features change slightly.")
    ] = False,
    on_error: Annotated[OnError, typer.Option(help="What to do with an unreadable image.")] = OnError.RAISE,
    as_json: AsJson = False,
) -> None:
    """Encode PHOTOS into EMB: the same command resumes after a stop and retries what failed.

    A part is a matrix (.npy), a table of facts about its images (.parquet) and a note that it is done (.json).
    If a shard fails, the others are still made, and the exit code is 1.
    """
    number, count = parse_shard(shard)
    if number is not None and (shards is not None or jobs > 1 or ray is not None):
        raise typer.BadParameter("makes one part; omit --shards, --jobs and --ray.", param_hint="--shard")
    if model is not None and backbone is not None:
        raise typer.BadParameter("has its own backbone; omit --backbone.", param_hint="--model")
    with err.status("Loading the model"):
        from clipadapt.embeddings.executors import Job, encode_shards, shards_of
        from clipadapt.embeddings.listing import list_images

        adapted = None if model is None else str(model.resolve())
        tower, plain = load_both(backbone, adapted, device)
    if model is not None and tower.image_fingerprint == plain.image_fingerprint:
        note(f"{model} encodes images as its backbone does: embeddings made without --model serve it, too.")
    with err.status("Listing the images"):
        listing = list_images(photos)
        total = shards_of(listing, target, count if count is not None else shards)
    options: dict[str, Any] = {
        "model": adapted,
        "batch_size": batch_size,
        "fast_decode": fast_decode,
        "on_error": on_error.value,
        "progress": jobs == 1 and ray is None,
    }
    begun = time.perf_counter()
    rows = encode_shards(
        Job(partial(load_tower, backbone, adapted, device), listing, target, total, options),
        only=number,
        jobs=jobs,
        ray=ray,
        gpus=int(device.startswith("cuda")),
        tower=tower,
        tell=note,
    )
    report(rows, target, total, time.perf_counter() - begun, as_json)


def parse_shard(text: str | None) -> tuple[int | None, int | None]:
    """The numbers I and N of I/N."""
    if text is None:
        return None, None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise typer.BadParameter(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/10.", param_hint="--shard")
    return int(found[1]), int(found[2])


def load_tower(backbone: str | None, model: str | None, device: str) -> Any:
    """What encodes the images: a backbone, or the image tower of an adapted model."""
    return load_both(backbone, model, device)[0]


def load_both(backbone: str | None, model: str | None, device: str) -> tuple[Any, Any]:
    """What encodes the images, and its backbone."""
    from clipadapt.backbones import load_backbone
    from clipadapt.features.encoder import in_text_space
    from clipadapt.methods import load
    from clipadapt.methods.artifact import origin_of

    if model is None:
        plain = load_backbone(backbone, device)
        return plain, plain
    origin = origin_of(model)
    base = None if origin is None else load_backbone(origin["source"], device)
    return in_text_space(load(model, base).encoder), base


def report(rows: list[dict[str, Any]], target: str, total: int, seconds: float, as_json: bool) -> None:
    """What was made, what was there already, and what failed, which makes the exit code 1."""
    made = [row for row in rows if "rows" in row]
    failed = {row["shard"]: row["error"] for row in rows if "error" in row}
    images, skipped = sum(row["rows"] for row in made), sum(row["skipped"] for row in made)
    document = {
        "out": target,
        "shards": total,
        "made": [row["shard"] for row in made],
        "done_before": sum("done" in row for row in rows),
        "failed": {str(shard): error for shard, error in failed.items()},
        **with_old_key("images", images),
        "skipped": skipped,
        "seconds": round(seconds, 3),
    }
    if as_json:
        print_json(document)
    else:
        rate = f", {(images + skipped) / seconds:,.1f} images/s" if made else ""
        before = f"; {count_of(document['done_before'], 'part')} done before" if document["done_before"] else ""
        line = f"{target}: {count_of(images, 'image')} in {count_of(len(made), 'part')} of {total:,}{before}"
        out.print(line, markup=False, soft_wrap=True)
        note(f"{duration(seconds)}{rate}" + (f"; {count_of(skipped, 'image')} skipped" if skipped else ""))
    if failed:
        err.print(
            f"{count_of(len(failed), 'shard')} of {total:,} failed: {', '.join(map(str, failed))}; the same command "
            "makes only what is missing.",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)
