"""Ships a finished run of `clipadapt pretrain embedded` as "embedded-photos", and measures what was shipped.

    python benchmarks/embedded_photos.py RUN CORPUS DATA --from ARCHIVES

copies RUN/together/model as float16 into src/clipadapt/backbones/embedded_photos, evaluates that folder as anyone would
load it, and writes benchmarks/embedded_photos.json. DATA holds Caltech-101 and its published split, which nothing of
the training has seen; 16-shot support sets are drawn by the published sampler, seeds 1-3; settings are the defaults.
`--measure` leaves the shipped folder as it is.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clipadapt
from clipadapt.backbones import Backbone, load_backbone
from clipadapt.backbones.scratch import save_clip
from clipadapt.data.corpus.pairs import Corpus
from clipadapt.data.definitions.definition import load
from clipadapt.data.splits import sample_shots
from clipadapt.evaluation.studies.pretraining import corpus_hooks
from clipadapt.features import encode_images
from clipadapt.training.embedded.prepare import photo_files, wordnet

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "src/clipadapt/backbones/embedded_photos"
METHODS = ("gda-clip", "linear-probe", "tip-adapter", "proker")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run (--out of `clipadapt pretrain embedded`)")
    parser.add_argument("corpus", type=Path, help="folder of the corpus")
    parser.add_argument("data", type=Path, help="folder of data sets, with Caltech-101")
    parser.add_argument("--from", dest="archives", type=Path, help="folder of packages; default: CORPUS/archives")
    parser.add_argument("--measure", action="store_true", help="measure what is shipped, ship nothing")
    options = parser.parse_args()
    if not options.measure:
        trained = load_backbone(options.run / "together" / "model")
        save_clip(trained.model, trained.tokenizer, SHIPPED, dtype=torch.float16, processor=trained.processor)
    backbone = load_backbone("embedded-photos")
    archives = options.archives or options.corpus / "archives"
    senses = wordnet(archives).senses
    known = {name.lower() for one in photo_files(archives) for name in senses[one].names}  # of ImageNet's classes
    figures: dict[str, Any] = {"caltech101": caltech(backbone, options.data, known), "speed": speed(backbone)}
    hooks = corpus_hooks(Corpus.open(options.corpus), backbone.image_size[0], trunk=backbone)
    figures |= {name: hook(backbone) for name, hook in hooks.items()}
    for name, values in figures.items():
        print(name, json.dumps(values))
    results = {
        "figures": figures,
        "model": {
            "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
            "bytes": sum(file.stat().st_size for file in SHIPPED.iterdir()),
            "vocabulary": len(backbone.tokenizer),
        },
        "recipe": json.loads((ROOT / "examples/pretrain/recipe_photos.json").read_text()),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
    }
    (ROOT / "benchmarks/embedded_photos.json").write_text(json.dumps(results, indent=1) + "\n")


def caltech(backbone: Backbone, data: Path, known: set[str]) -> dict[str, Any]:
    """Zero-shot on the whole test part, apart for classes that ImageNet has by name, and after 16 shots."""
    split = load("caltech101", data).split
    features = encode_images(backbone, split.test).features
    names = split.test.class_names
    labels = np.array(split.test.labels)
    zero = clipadapt.create("zero-shot", templates="photo").fit(backbone, class_names=split.train.class_names)
    found = np.asarray(zero.logits(features))
    right = found.argmax(1) == labels
    place = (found >= found[np.arange(len(labels)), labels][:, None]).sum(1)
    named = np.array([name.replace("_", " ").lower() in known for name in names])[labels]
    out: dict[str, Any] = {
        "images": len(labels),
        "zero_shot": right.mean(),
        "zero_shot_top5": (place <= 5).mean(),
        "zero_shot_macro": np.mean([right[labels == label].mean() for label in np.unique(labels)]),
        "zero_shot_imagenet_names": right[named].mean(),
        "zero_shot_other_names": right[~named].mean(),
        "classes_with_imagenet_names": sum(name.replace("_", " ").lower() in known for name in names),
    }
    for key in METHODS:
        scores = []
        for seed in (1, 2, 3):
            support = split.train.select(sample_shots(split.train.labels, 16, random.Random(seed)))
            scores.append(clipadapt.create(key).fit(backbone, support).score(split.test))
        out[f"16_shots_{key}"] = np.mean(scores)
    return {name: float(value) for name, value in out.items()}


@torch.no_grad()
def speed(backbone: Backbone) -> dict[str, float]:
    """Images a second from pixels, on this machine's threads."""
    pixels = torch.randn(32, 3, *backbone.image_size)
    backbone.encode_images(pixels)
    start = time.perf_counter()
    for _ in range(6):
        backbone.encode_images(pixels)
    return {"images_per_second": 6 * 32 / (time.perf_counter() - start), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main()
