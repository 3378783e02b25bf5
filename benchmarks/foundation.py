"""What the first release must show: exemplar methods on real CLIP features, and the main job on Caltech-101.

    python benchmarks/foundation.py ../shared/data whu            # writes benchmarks/foundation_whu.jsonl
    python benchmarks/foundation.py ../shared/data caltech        # writes benchmarks/foundation_caltech.jsonl
    python benchmarks/foundation.py ../shared/data adapt          # only `adapt` of it, into foundation_adapt.jsonl
    python benchmarks/foundation.py ../shared/data digits         # writes benchmarks/foundation_digits.jsonl

`whu-rs19`: published features of two real CLIP encoders; 16-shot support sets drawn by the published sampler, seeds
1-3, all other images are the test set; default hyper-parameters, nothing searched.
`caltech101`: the published split, 16 shots, seeds 1-3, embedded model; each method is searched and judged inside the
support set (`select`), refitted on all of it and scored on the published test part. `adapt` is timed as a user runs
it: a new process, an empty feature cache. The test part has up to 240 images of a class and as few as 10, the
support set as many of each; cross-validation weighs the classes by their frequency in the training part, as `adapt`
does. "balanced" is the mean over classes.
`digits`: every method, those that train the towers included, on scikit-learn's handwritten digits, 8 shots, seeds
1-3, embedded model, with the quick settings of the suite few-shot-towers (and the search inside the support set).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import clipadapt
from clipadapt.data.digits import handwritten_digits
from clipadapt.data.splits import sample_shots
from clipadapt.evaluation.bench.suite import load_suite
from clipadapt.evaluation.selection import select
from clipadapt.methods import method_class
from clipadapt.methods.recipe import recipe
from clipadapt.metrics.classification import accuracy, macro_accuracy

SEEDS = (1, 2, 3)
SHOTS = (1, 2, 4, 8, 16)


def whu(data: Path) -> list[dict[str, Any]]:
    rows = []
    keys = [k for k in clipadapt.list_methods() if method_class(k).kind == "features"]
    for encoder in ("clip_rn50", "clip_vit-b-32"):
        z = np.load(data / "whu-rs19" / f"{encoder}.npz")
        x, y, t = z["image_features"], z["labels"], z["mean_prompt_features"]
        for shots in SHOTS:
            for key in keys:
                scores, start = [], time.perf_counter()
                for seed in SEEDS:
                    support = sample_shots(y.tolist(), shots, random.Random(seed))
                    test = np.setdiff1d(np.arange(len(y)), support)
                    head = clipadapt.create(key).fit_features(x[support], y[support], t)
                    scores.append(float((np.asarray(head.logits(x[test])).argmax(1) == y[test]).mean()))
                rows.append(
                    {
                        "data": "whu-rs19",
                        "encoder": encoder,
                        "method": key,
                        "shots": shots,
                        "accuracy": scores,
                        "mean": float(np.mean(scores)),
                        "seconds": (time.perf_counter() - start) / len(SEEDS),
                        "trained_parameters": head.trained_parameters,
                    }
                )
    return rows


def caltech_files(data: Path) -> tuple[Path, Path]:
    """The published split, and the folder of its pictures."""
    return data / "coop-splits" / "split_zhou_Caltech101.json", data / "caltech101" / "101_ObjectCategories"


def caltech(data: Path, budget: float) -> list[dict[str, Any]]:
    rows = []
    split_file, root = caltech_files(data)
    for seed in SEEDS:
        rows.append(timed_adapt(split_file, root, seed, budget))
        backbone = clipadapt.load_backbone()
        split = clipadapt.coop_split(split_file, root=root)
        support = split.few_shot(16, seed=seed)[0]
        selection = select(backbone, support, budget=budget, seed=seed, frequencies=split.train.counts)
        for trial in selection.trials:
            start = time.perf_counter()
            predicted = trial.create().fit(backbone, support).predict(split.test)
            rows.append(
                {
                    "data": "caltech101",
                    "method": trial.key,
                    "seed": seed,
                    "hyperparameters": trial.hyperparameters,
                    "chosen": trial is selection.best,
                    "cross_validated": trial.accuracy,
                    "test": accuracy(split.test.labels, predicted),
                    "balanced": macro_accuracy(split.test.labels, predicted),
                    "select_seconds": trial.seconds,
                    "fit_and_score_seconds": time.perf_counter() - start,
                    "trained_parameters": trial.trained_parameters,
                }
            )
        rows += [{"data": "caltech101", "seed": seed, "skipped": key, "why": why} for key, why in selection.skipped]
    return rows


def digits() -> list[dict[str, Any]]:
    rows = []
    backbone = clipadapt.load_backbone()
    quick = {entry.key: entry.hyperparameters for entry in load_suite("few-shot-towers").methods}
    for seed in SEEDS:
        train, test = handwritten_digits().split(test=0.3, seed=seed)
        support = train.few_shot(8, seed=seed)
        for key in clipadapt.list_methods():
            overrides = {key: quick.get(key, {})}
            start = time.perf_counter()
            trials = select(
                backbone, support, keys=[key], folds=2, budget=math.inf, seed=seed, overrides=overrides
            ).trials
            model = trials[-1].create().fit(backbone, support)
            rows.append(
                {
                    "data": "digits",
                    "method": key,
                    "seed": seed,
                    "hyperparameters": recipe(model)["hyperparameters"],
                    "test": model.score(test),
                    "seconds": time.perf_counter() - start,
                    "trained_parameters": model.trained_parameters,
                }
            )
    return rows


def timed_adapt(split_file: Path, root: Path, seed: int, budget: float) -> dict[str, Any]:
    """The main job as a user runs it the first time: wall seconds and peak memory of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "clipadapt.cli", "adapt", str(split_file), "--root", str(root)]
        command += ["--shots", "16", "--seed", str(seed), "--budget", str(budget), "--out", f"{folder}/model", "--json"]
        start = time.perf_counter()
        run = subprocess.run(
            command, env=os.environ | {"CLIPADAPT_CACHE": f"{folder}/cache"}, check=True, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # GiB
    document = {name: value for name, value in json.loads(run.stdout).items() if name != "model"}
    return {"data": "caltech101", "adapt": document, "seed": seed, "seconds": seconds, "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder that holds whu-rs19/, caltech101/ and coop-splits/")
    parser.add_argument("part", choices=("whu", "caltech", "adapt", "digits"))
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for --method auto")
    options = parser.parse_args()
    facts = {"clipadapt": clipadapt.__version__}
    if options.part == "whu":
        rows = whu(options.data)
    else:
        facts["backbone"] = clipadapt.load_backbone().fingerprint
        rows = {
            "caltech": lambda: caltech(options.data, options.budget),
            "adapt": lambda: [timed_adapt(*caltech_files(options.data), seed, options.budget) for seed in SEEDS],
            "digits": digits,
        }[options.part]()
    out = Path(__file__).with_name(f"foundation_{options.part}.jsonl")
    out.write_text("".join(json.dumps(facts | row) + "\n" for row in rows))
    printed = {"whu": print_whu, "caltech": print_caltech, "adapt": print_caltech, "digits": print_digits}
    printed[options.part](rows)
    print(f"\n{out}")


def print_whu(rows: list[dict[str, Any]]) -> None:
    print(
        "| method |"
        + "".join(f" RN50, {n} |" for n in SHOTS)
        + "".join(f" ViT-B/32, {n} |" for n in SHOTS)
        + " s/fit |"
    )
    print("|---|" + "---|" * (2 * len(SHOTS) + 1))
    for key in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == key]
        print(f"| {key} |" + "".join(f" {100 * r['mean']:.1f} |" for r in mine) + f" {mine[-1]['seconds']:.2f} |")


def print_caltech(rows: list[dict[str, Any]]) -> None:
    print("| method | cross-validated | test, balanced | test | seconds to judge |")
    print("|---|---|---|---|---|")
    trials = [r for r in rows if "test" in r]
    for key in dict.fromkeys(r["method"] for r in trials):
        mine = [r for r in trials if r["method"] == key]
        judged = " ".join(f"{100 * r['cross_validated']:.1f}" for r in mine)
        balanced, tested = (
            " ".join(f"{100 * r[what]:.1f}{'*' if r['chosen'] else ''}" for r in mine) for what in ("balanced", "test")
        )
        print(f"| {key} | {judged} | {balanced} | {tested} | {np.mean([r['select_seconds'] for r in mine]):.1f} |")
    for r in rows:
        if "adapt" in r:
            held_out = r["adapt"]["held_out"]
            figures = (f"{100 * held_out[m]['accuracy']:.1f} %" for m in ("zero_shot", "adapted"))
            print(f"adapt, seed {r['seed']}: {r['seconds']:.0f} s, {r['peak_gib']:.2f} GiB,", " -> ".join(figures))


def print_digits(rows: list[dict[str, Any]]) -> None:
    print("| method | test, seeds 1-3 | trained parameters | seconds |")
    print("|---|---|---|---|")
    for key in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == key]
        tested = " ".join(f"{100 * r['test']:.1f}" for r in mine)
        print(f"| {key} | {tested} | {mine[0]['trained_parameters']:,} | {np.mean([r['seconds'] for r in mine]):.1f} |")


if __name__ == "__main__":
    main()
