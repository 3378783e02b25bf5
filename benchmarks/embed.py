"""How fast pictures become embeddings, beside what a user would write, and what a billion of them would take.

    python benchmarks/embed.py PICTURES [--limit N] [--batch-size N] [--threads N] [--device cuda] [--rounds N]
    python benchmarks/embed.py --fast-decode IMAGES [--limit N] [--backbone SOURCE]
    python benchmarks/embed.py --plan [PAGE]

The first prints JSON lines of one run: clipadapt, a plain `transformers` loop and `sentence-transformers` (where it is
installed) on the same folder of weights, a CLIP of ViT-B/32's shape with random weights in float32, at the same batch
size; and the same model on ready pixels. Sides take turns, round by round, and each round gives ratios; the medians
are reported. The second says what `fast_decode` saves on 12-megapixel JPEGs, and how far it moves features. The third
reckons, from the rows in embed.jsonl, and writes the table into PAGE between its two markers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.backbones.preprocess import Preprocess
from clipadapt.data import as_items, image_files
from clipadapt.embeddings import encode_shard
from clipadapt.features import encode_images

Row = dict[str, Any]
RESULTS = Path(__file__).with_suffix(".jsonl")
MARKERS = ("<!-- plan: python benchmarks/embed.py --plan docs/scale.md -->", "<!-- end of plan -->")


# -- side by side ----------------------------------------------------------------------------------------------------


def throughput(paths: list[str], batch_size: int, rounds: int, device: str) -> Iterator[Row]:
    """Seconds of each side on the same pictures, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        write_clip(folder)
        backbone = load_backbone(folder, device)
        pixels = torch.stack([backbone.preprocess(Image.open(path).convert("RGB")) for path in paths])
        sides: dict[str, Callable[[], torch.Tensor]] = {
            "model alone": lambda: encode_images(backbone, pixels, batch_size=batch_size).features,
            "clipadapt": lambda: encode_images(backbone, paths, cache=False, batch_size=batch_size).features,
            "transformers": plain_loop(folder, paths, batch_size, device),
        }
        try:
            sides["sentence-transformers"] = sentence_transformers(folder, paths, batch_size, device)
        except ImportError as error:
            yield {"case": "throughput", "side": "sentence-transformers", "left_out": str(error)}
        features = {name: work() for name, work in sides.items()}  # and warm up
        seconds = [{name: timed(work) for name, work in sides.items()} for _ in range(rounds)]
    for name in sides:
        yield {
            "case": "throughput",
            "side": name,
            "pictures_per_second": round(len(paths) / statistics.median(row[name] for row in seconds), 2),
            "clipadapt_over_it": round(statistics.median(row[name] / row["clipadapt"] for row in seconds), 3),
            "max_difference": float((features[name] - features["clipadapt"]).abs().max()),
        }
    yield {
        "case": "share",
        "outside_model": round(statistics.median(1 - row["model alone"] / row["clipadapt"] for row in seconds), 4),
    }
    yield {"case": "bytes", **part_sizes(backbone, paths, batch_size)}


def write_clip(folder: str) -> None:
    """A CLIP of ViT-B/32's shape with random weights, as a folder that all sides read."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={token: row for row, token in enumerate(tokens)}, merges=[])
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig()).save_pretrained(folder)
    transformers.CLIPProcessor(transformers.CLIPImageProcessorPil(), tokenizer).save_pretrained(folder)


def plain_loop(folder: str, paths: list[str], batch_size: int, device: str) -> Callable[[], torch.Tensor]:
    """What one writes with transformers and nothing else."""
    model = transformers.CLIPModel.from_pretrained(folder).eval().to(device)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)

    @torch.no_grad()
    def encode() -> torch.Tensor:
        rows = []
        for start in range(0, len(paths), batch_size):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + batch_size]]
            inputs = processor(images=images, return_tensors="pt").to(device)
            features = model.get_image_features(**inputs).pooler_output  # (B, D)
            rows.append(torch.nn.functional.normalize(features, dim=-1).cpu())
        return torch.cat(rows)

    return encode


def sentence_transformers(folder: str, paths: list[str], batch_size: int, device: str) -> Callable[[], torch.Tensor]:
    """What its own documentation shows for CLIP models."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import CLIPModel

    model = SentenceTransformer(modules=[CLIPModel(folder)], device=device)
    options = {"batch_size": batch_size, "convert_to_tensor": True, "normalize_embeddings": True}
    return lambda: model.encode([Image.open(path) for path in paths], show_progress_bar=False, **options).cpu()


def part_sizes(backbone: Backbone, paths: list[str], batch_size: int) -> Row:
    """Bytes a picture of what is read and of what is written."""
    with tempfile.TemporaryDirectory() as out:
        encode_shard(backbone, paths, out, batch_size=batch_size)
        written = {ending: next(Path(out).glob(f"*.{ending}")).stat().st_size for ending in ("npy", "parquet")}
    read = sum(os.path.getsize(path) for path in paths)
    return {name: round(size / len(paths)) for name, size in {"picture": read, **written}.items()}


# -- fast decoding ---------------------------------------------------------------------------------------------------


def fast_decode(paths: list[str], rounds: int, backbone: Backbone) -> Iterator[Row]:
    """A model on JPEGs of 4000 x 3000 pixels; and, without a model, pixels as one that sees 224 x 224 takes them."""

    def pixels(fast: bool) -> torch.Tensor:
        items = [item.open_reduced(448) if fast else item.open() for item in as_items(large)]
        return torch.stack([preprocess(item) for item in items])

    preprocess = Preprocess()
    with tempfile.TemporaryDirectory() as folder:
        large = [f"{folder}/{number}.jpg" for number in range(len(paths))]
        for path, target in zip(paths, large, strict=True):
            picture = Image.open(path).convert("RGB").resize((4000, 3000), Image.Resampling.LANCZOS)
            grain = np.random.default_rng(0).normal(0, 8, (3000, 4000, 3))  # as of a sensor: enlarging leaves none
            picture = Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
            picture.save(target, quality=90)
        whole, fast = (encode_images(backbone, large, cache=False, fast_decode=on).features for on in (False, True))
        seconds = [
            [timed(lambda on=on: encode_images(backbone, large, cache=False, fast_decode=on)) for on in (False, True)]
            for _ in range(rounds)
        ]
        decoding = [[timed(lambda on=on: pixels(on)) for on in (False, True)] for _ in range(rounds)]
    cosine = (whole * fast).sum(1)
    yield {
        "case": "fast-decode",
        "time_saved": round(statistics.median(1 - quick / slow for slow, quick in seconds), 3),
        "mean_cosine": round(float(cosine.mean()), 6),
        "min_cosine": round(float(cosine.min()), 6),
        "model_sees": backbone.image_size,
    }
    yield {
        "case": "fast-decode-224",
        "time_saved": round(statistics.median(1 - quick / slow for slow, quick in decoding), 3),
    }


# -- a billion -------------------------------------------------------------------------------------------------------


def plan(rows: list[Row], pictures: int = 10**9, workers: int = 100) -> str:
    """What `pictures` take, for each rate that was measured, as a Markdown table with its sums written out."""
    rates = [row for row in rows if row["case"] == "throughput" and row.get("side") == "clipadapt"]
    sizes = next((row for row in rows if row["case"] == "bytes"), None)
    if not rates or sizes is None:
        return "*Not measured yet: the rows of `benchmarks/embed.jsonl` go here.*"
    lines = [
        f"| one worker | pictures/s (measured) | worker-hours for {pictures:,} | days with {workers} workers |",
        "|---|---:|---:|---:|",
    ]
    for row in rates:
        rate = row["pictures_per_second"]
        hours = pictures / rate / 3600
        total = f"{pictures:.0e} / {rate:,.1f} / 3,600 = {hours:,.0f}".replace("e+0", "e")
        days = f"{hours:,.0f} / {workers} / 24 = {hours / workers / 24:,.1f}"
        lines.append(f"| {row['machine']} | {rate:,.1f} | {total} | {days} |")
    names = {
        "picture": "read: the pictures, as measured",
        "npy": "written: matrix, 2 bytes a dimension",
        "parquet": "written: table",
    }
    lines += ["", f"| bytes | one picture (measured) | {pictures:,} |", "|---|---:|---:|"]
    for name, what in names.items():
        total = f"{sizes[name]:,} x {pictures:.0e} = {sizes[name] * pictures / 1e12:,.2f} TB".replace("e+0", "e")
        lines.append(f"| {what} | {sizes[name]:,} | {total} |")
    return "\n".join(lines)


def write_plan(page: Path, table: str) -> None:
    """Put the table between the markers of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise SystemExit(f"{page} lacks the markers {MARKERS[0]} and {MARKERS[1]}.")
    page.write_text(f"{before}{MARKERS[0]}\n{table}\n{end}{after}", encoding="utf-8")


def read_results() -> list[Row]:
    """The rows that were measured; none if they are not there yet."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


# -- helpers ---------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def machine(device: str, threads: int) -> str:
    """What a rate was measured on, for people."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, {os.cpu_count()} cores"
    return f"{platform.machine()}, threads: {threads}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="?", help="folder of pictures; with --plan, the page")
    parser.add_argument("--limit", type=int, default=512, help="pictures to take, spread over the folder")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fast-decode", action="store_true")
    parser.add_argument("--backbone", help="for --fast-decode; the embedded model by default")
    parser.add_argument("--plan", action="store_true")
    arguments = parser.parse_args()
    if arguments.plan:
        table = plan(read_results())
        if arguments.pictures:
            write_plan(arguments.pictures, table)
        print(table)
        raise SystemExit
    torch.set_num_threads(arguments.threads)
    found = image_files(arguments.pictures)
    paths = list(islice(found, 0, None, max(1, len(found) // arguments.limit)))[: arguments.limit]
    if arguments.fast_decode:
        made = fast_decode(paths, arguments.rounds, load_backbone(arguments.backbone, arguments.device))
    else:
        made = throughput(paths, arguments.batch_size, arguments.rounds, arguments.device)
    facts = {
        "machine": machine(arguments.device, arguments.threads),
        "pictures": len(paths),
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for row in made:
        print(json.dumps(row | facts), flush=True)
