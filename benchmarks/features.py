"""What encoding a folder of pictures costs around the model, and what the cache saves.

    python benchmarks/features.py PICTURES [--backbone SOURCE] [--limit N] [--workers N ...]

Prints JSON lines. `first` decodes, encodes and fills an empty cache; `second` finds everything in it; `model` is the
model alone on the same pictures, already decoded. All are measured in turn in one process, so their ratios hold on a
busy machine too; `cpu` is the process's CPU time, `wall` the time that passed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipadapt.backbones import Backbone, load_backbone
from clipadapt.data import Item, as_items, image_files
from clipadapt.features import encode_images


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": round(time.perf_counter() - wall, 3), "cpu": round(time.process_time() - cpu, 3)}


def measure(backbone: Backbone, items: list[Item], workers: int, batch_size: int) -> dict[str, Any]:
    """Seconds and ratios for one number of workers."""
    pixels = torch.stack([backbone.preprocess(item.open()) for item in items])
    with tempfile.TemporaryDirectory() as cache:

        def encode() -> None:
            encode_images(backbone, items, cache=Path(cache), workers=workers, batch_size=batch_size)

        model = timed(lambda: encode_images(backbone, pixels, batch_size=batch_size))
        first, second = timed(encode), timed(encode)
    return {
        "workers": workers,
        "pictures": len(items),
        "first": first,
        "second": second,
        "model": model,
        "pictures_per_second": round(len(items) / first["wall"], 1),
        "second_over_first": round(second["wall"] / first["wall"], 4),
        "wall_outside_model": round(1 - model["wall"] / first["wall"], 3),
        "cpu_outside_model": round(1 - model["cpu"] / first["cpu"], 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--backbone", help="as for load_backbone(); the embedded model by default")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    backbone = load_backbone(arguments.backbone)
    items = as_items(image_files(arguments.pictures)[: arguments.limit])
    encode_images(backbone, items[:64], cache=False)  # warm up
    for workers in arguments.workers:
        print(json.dumps(measure(backbone, items, workers, arguments.batch_size)), flush=True)
