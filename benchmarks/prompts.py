"""The prompt methods side by side on the embedded model: base to new classes, few shots, and drawing styles.

    python benchmarks/prompts.py ../shared/data --tune           # first: learning rates, into prompts_settings.json
    python benchmarks/prompts.py ../shared/data                  # the cells that prompts.jsonl lacks, and a table
    python benchmarks/prompts.py --tasks kinds --methods "co*"   # what needs no data

Each method of the family "prompt-learning", and zero-shot, is one row; each (task, method, seed) is one cell, a process
of its own, and one JSON line. A cell that fails is a line that says why. Cells that are there, with the settings of
now, are not run again, failed ones are; delete lines to run them anew.

Tasks, with 16 shots each, but 8 where there are all of Caltech's classes:

kinds           base to new: 18 kinds of drawn things (`TRAIN_KINDS[::3]`), 9 and 9, in all six styles of training
coloured        base to new: 10 kinds in 4 colours, 20 and 20 classes such as "red arrow"; the new kinds are others
caltech101      base to new: the published split, 50 and 50 classes
caltech101-all  few shots: the same, all 100 classes
styles          domains: the 18 kinds, learned from the styles of `LEARNED`; on new pictures of these (few shots), and
                of the other four ("sketch" is one that the embedded model never saw)

How the drawn tasks were chosen: by the accuracy of zero-shot ("a photo of a {}.") alone, before any method was run.
On new classes it should be well above chance, as new accuracy means nothing otherwise, and well below 100 %.

    zero-shot accuracy in %, 12 to 60 pictures a class     all    base    new    chance among new
    kinds: all 53 of training                             19.1    28.0   24.0      3.8
    kinds: every third of them, 18                        35.7    49.4   45.6     11.1   taken: kinds, styles
    kinds: 6 of training, the 6 held out                  35.8    60.0   25.4     16.7   too near to chance
    colours, 11                                           90.9    98.9   87.7     20.0   too easy
    textures, 5; counts, 5                          36.0; 43.7    51; 51  73; 69  50.0   too few
    4 colours of 10 kinds (every fifth), 40               38.1    56.2   46.1      5.0   taken: coloured
    4 colours of 12 kinds, the 6 held out among them      31.4    48.6   35.1      4.2
    caltech101, test part, 100                             3.0     3.7    9.2      2.0   photographs, as asked for

How to read it. The embedded model has 5.8 million parameters and was trained on drawings, so figures do not compare
with published ones (ViT-B/16: CLIP 69.3 / 74.2, CoOp 82.7 / 63.2); what does is the sign of things: how much a method
gains on base classes, and what that costs on new ones. On caltech101 zero-shot is near chance: what a method gains on
base classes it had to learn, and its new accuracy says little. Accuracies are means over the seeds; a difference of two
methods below about 3 points is noise (540 and 720 test pictures in each half of a drawn task). "H of averages" is the
harmonic mean of the average base and the average new accuracy, which most papers print, "average of H" the other
convention; both are over the drawn tasks. Methods marked * were told the names of the new classes while they learned.

Settings. The papers' values assume a logit scale of 100 and minutes on a GPU; here the scale is 22.5, and there are
two CPU cores. So two things differ, and each line says how: how long a method learns (the same number of pictures seen
in every task, which sets the epochs), and its learning rate, 1, 10 or 100 times the paper's. That one is chosen by
`--tune` for each base-to-new task: a base support set, drawn with a seed of its own (0), is learned from with each rate
and judged on the base classes' other training pictures; the smaller rate of equal ones. (One rate for all tasks was
tried: Caltech, where zero-shot knows nothing, then decides it alone.) The task "styles" takes the rates of "kinds",
"caltech101-all" those of "caltech101". No picture of a test part, and no new class, is looked at. The rates are thus
chosen with more labels than a support set has: two-fold cross-validation inside it was tried first, and could not tell
CoOp's three rates apart.
All else is the paper's, in its setting for base to new where it has one; `BENCH` lists what is not. Without
prompts_settings.json, rates are the papers' too.

Seconds are those of `fit` on one thread, where features of the frozen towers are in the cache (a user's first run
encodes them too, once); cpu_seconds and the peak of the memory are those of the whole process, the import of the
libraries aside, and do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
import transformers

import clipadapt
from clipadapt.backbones import Backbone
from clipadapt.data import Dataset
from clipadapt.data.items import GeneratedItem, ImageItem
from clipadapt.data.playground.drawing import STYLES, TRAIN_KINDS, TRAIN_STYLES, VERSION, Playground
from clipadapt.evaluation.base_to_new import (
    average_of_harmonics,
    base_support,
    base_to_new,
    harmonic,
    harmonic_of_averages,
)
from clipadapt.features import encode_images
from clipadapt.methods import Method, method_class
from clipadapt.methods.artifact import recipe
from clipadapt.metrics.classification import accuracy

HERE = Path(__file__).resolve().parent
SETTINGS = HERE / "prompts_settings.json"
LEARNED = ("flat", "watercolour", "chalk")  # the styles that are learned from in the task "styles"
COLOURS = ("red", "green", "blue", "yellow")
TASKS = {
    "kinds": "base-to-new",
    "coloured": "base-to-new",
    "caltech101": "base-to-new",
    "caltech101-all": "few-shot",
    "styles": "domains",
}
TUNED_ON = {"caltech101-all": "caltech101", "styles": "kinds"}  # whose learning rates a task takes, if not its own
AVERAGED = ("kinds", "coloured")  # base-to-new tasks where zero-shot tells new classes apart
SHOTS = {"caltech101-all": 8}  # 16 elsewhere
TUNE_SEED = 0
FACTORS = (1, 10, 100)  # of a paper's learning rate

# Pictures that a method sees while it learns; a method that runs the image tower takes many times as long for each.
PICTURES, PICTURES_FROM_PIXELS = 5_000, 1_000

# What else is set, per method: hyper-parameters, which may depend on the epochs; "pictures" instead of the number
# above; "factors" of the learning rate, none where it is left as it is.
BENCH: dict[str, dict[str, Any]] = {
    "coop": {"init": "a photo of a"},  # as in CoCoOp's tables; CoOp's own have 16 random vectors
    "cocoop": {"pictures": 800},  # a step for each, at batch 1
    "gopro": {"pictures": 400, "views": lambda epochs: min(4, epochs)},  # texts and a view of its own for each picture
    "kgcoop": {"batch_size": 32},  # 128 would be a quarter of the others' steps
    "mocoop": {"pictures": 2_500},  # a step costs five times CoOp's
    "prograd": {"n_ctx": 4},
    "promptsrc": {"gpa_mean": lambda epochs: 0.75 * epochs},  # epoch 15 of 20
    "ship": {"method": "coop", "pictures": 16_000, "factors": ()},  # its own rate is of a loss without a logit scale
    # sentences instead of pictures: as many, 16 a class, and as many seen
    "tai-dpt": {"init": "a photo of a", "sentences": 16, "batch_size": 32},
}


@dataclass(frozen=True)
class Task:
    """A protocol with its pictures."""

    name: str
    train: Dataset = field(repr=False)
    test: Dataset = field(repr=False)
    shots: int

    @property
    def protocol(self) -> str:
        return TASKS[self.name]

    def support(self, seed: int) -> Dataset:
        if self.protocol == "base-to-new":
            return base_support(self.train, self.shots, seed)
        return self.train.few_shot(self.shots, seed=seed)


# -- tasks -----------------------------------------------------------------------------------------------------------


def tasks(names: list[str], data: Path | None) -> list[Task]:
    learning, judging = Playground(seed=1), Playground(seed=2)  # the worlds of the training and of the test pictures
    kinds = TRAIN_KINDS[::3]

    def both(draw: Callable[[Playground], Dataset]) -> tuple[Dataset, Dataset]:
        return draw(learning), draw(judging)

    made: dict[str, Callable[[], tuple[Dataset, Dataset]]] = {
        "kinds": lambda: both(lambda w: w.dataset(60, kinds=kinds, styles=TRAIN_STYLES)),
        "coloured": lambda: both(lambda w: coloured(w, TRAIN_KINDS[::5][:10], 36)),
        "styles": lambda: (
            learning.dataset(60, kinds=kinds, styles=LEARNED),
            judging.dataset(70, kinds=kinds, styles=tuple(STYLES)),
        ),
        "caltech101": lambda: caltech(data),
        "caltech101-all": lambda: caltech(data),
    }
    return [Task(name, *made[name](), SHOTS.get(name, 16)) for name in names]


def coloured(world: Playground, kinds: tuple[str, ...], n_per_class: int) -> Dataset:
    """Pictures of one thing, labelled by colour and kind; kinds come in order, so that base and new share none."""
    names = [f"{colour} {kind}" for kind, colour in product(kinds, COLOURS)]
    items, labels, domains = [], [], []
    for i, (label, (kind, colour)) in product(range(n_per_class), enumerate(product(kinds, COLOURS))):
        style, index = TRAIN_STYLES[i % len(TRAIN_STYLES)], i * len(names) + label
        fixed = {"kind": kind, "colour": colour, "style": style}
        key = f"playground {VERSION} {world} {index} {fixed}"
        items.append(GeneratedItem(f"{style}/{names[label]}/{i}", key, partial(picture, world, index, fixed)))
        labels.append(label)
        domains.append(style)
    return Dataset([*items], labels, names, domains, name="playground by colour and kind")


def picture(world: Playground, index: int, fixed: dict[str, Any]) -> Any:
    return world.scene(index, **fixed).image


def caltech(data: Path | None) -> tuple[Dataset, Dataset]:
    if data is None:
        sys.exit("The caltech101 tasks need the folder that holds caltech101/ and coop-splits/ as the first argument.")
    root = data / "caltech101" / "101_ObjectCategories"
    split = clipadapt.coop_split(data / "coop-splits" / "split_zhou_Caltech101.json", root=root)
    return split.train, split.test


def at_hand(task: Task, backbone: Backbone) -> Task:
    """The task with its pictures drawn, and their features in the cache: that is nobody's own time."""

    def drawn(data: Dataset) -> Dataset:
        items = [ImageItem(i.name, i.open()) if isinstance(i, GeneratedItem) else i for i in data.items]
        return replace(data, items=items)

    task = replace(task, train=drawn(task.train), test=drawn(task.test))
    for part in (task.train, task.test):
        encode_images(backbone, part)
    return task


# -- methods ---------------------------------------------------------------------------------------------------------


def methods(pattern: str) -> list[str]:
    keys = [k for k in clipadapt.list_methods(pattern) if method_class(k).card.family == "prompt-learning"]
    return ["zero-shot", *keys]


def configured(key: str, task: Task, support: Dataset, seed: int, tuned: dict[str, Any], lr: float | None) -> Method:
    """A method as it runs here; with `lr`, as it is tuned: with that rate, and told of no new names."""
    cls = method_class(key)
    known = {f.name for f in dataclasses.fields(cls)}
    values = {k: v for k, v in BENCH.get(key, {}).items() if k not in ("pictures", "factors")}
    if "epochs" in known:
        usual = PICTURES_FROM_PIXELS if getattr(cls, "reads_pixels", False) else PICTURES
        epochs = max(1, round(BENCH.get(key, {}).get("pictures", usual) / len(support)))
        values = {k: v(epochs) if callable(v) else v for k, v in values.items()} | {"epochs": epochs}
    if "seed" in known:
        values["seed"] = seed
    rates = tuned.get(key, {}).get(TUNED_ON.get(task.name, task.name), {})
    if "lr" in known and (lr or rates):
        values["lr"] = lr or rates["lr"]
    if isinstance(values.get("method"), str):
        values["method"] = configured(values["method"], task, support, seed, tuned, None)
    if "new_classes" in known and task.protocol == "base-to-new" and lr is None:
        values["new_classes"] = task.test.base_new_split()[1].class_names
    return clipadapt.create(key, **values)


def told_new_names(row: dict[str, Any]) -> bool:
    return bool(row["hyperparameters"].get("new_classes"))


# -- what a process of its own does ----------------------------------------------------------------------------------


def run_cell(task: Task, method: Method, seed: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    backbone = clipadapt.load_backbone()
    begun = time.perf_counter()
    if task.protocol == "base-to-new":
        result = base_to_new(method, backbone, task.train, task.test, task.shots, seed)
        model, seconds = result.model, result.seconds
        row: dict[str, Any] = {"base": result.base, "new": result.new, "harmonic": result.harmonic}
    else:
        model = method.fit(backbone, task.support(seed))
        seconds = time.perf_counter() - begun
        hits = model.predict(task.test) == np.array(task.test.labels)
        row = {"few_shot": float(hits.mean())}
        if task.protocol == "domains":
            domains = np.array(task.test.domains)
            styles = {style: float(hits[domains == style].mean()) for style in STYLES}
            row = {
                "few_shot": fmean(styles[s] for s in LEARNED),
                "other_styles": fmean(styles[s] for s in STYLES if s not in LEARNED),
                "by_style": styles,
            }
    return row | {
        "trained_parameters": model.trained_parameters,
        "seconds": seconds,
        "judging_seconds": time.perf_counter() - begun - seconds,
        "cpu_seconds": time.process_time(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def run_tuning(task: Task, key: str, tuned: dict[str, Any], threads: int) -> dict[float, float]:
    """Learning rate -> accuracy on the base classes' other training pictures; 0 where the loss diverged."""
    torch.set_num_threads(threads)
    backbone = clipadapt.load_backbone()
    support, pool = task.support(TUNE_SEED), task.train.base_new_split()[0]
    taken = {id(item) for item in support.items}
    held_out = pool.select(i for i, item in enumerate(pool.items) if id(item) not in taken)
    paper = next(f.default for f in dataclasses.fields(method_class(key)) if f.name == "lr")
    found = {}
    for factor in BENCH.get(key, {}).get("factors", FACTORS):
        lr = float(f"{paper * factor:.3g}")
        method = configured(key, task, support, TUNE_SEED, tuned, lr)
        try:
            found[lr] = accuracy(held_out.labels, method.fit(backbone, support).predict(held_out))
        except FloatingPointError:
            found[lr] = 0.0
    return found


# Processes are forked from one that has the imports already, which take most of a short cell's time.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["clipadapt.methods", "clipadapt.evaluation.base_to_new", "transformers.models.clip"])


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, PROCESSES) as pool:
        return pool.submit(function, *arguments).result()


def side_by_side(jobs: int, calls: dict[Any, tuple[Any, ...]]) -> Iterator[tuple[Any, Any, Exception | None]]:
    """(key, result, None) or (key, None, error) of each call, as they end."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(apart, *call): key for key, call in calls.items()}
        for future in as_completed(futures):
            error = future.exception()
            if error is None:
                yield futures[future], future.result(), None
            elif isinstance(error, Exception):
                yield futures[future], None, error
            else:
                raise error


# -- the runs --------------------------------------------------------------------------------------------------------


def tune(keys: list[str], chosen: list[Task], jobs: int, threads: int) -> None:
    backbone = clipadapt.load_backbone()
    tuned = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    ready = [at_hand(task, backbone) for task in chosen if task.protocol == "base-to-new"]
    keys = [
        key
        for key in keys
        if any(f.name == "lr" for f in dataclasses.fields(method_class(key)))
        and BENCH.get(key, {}).get("factors", FACTORS)
    ]
    calls = {(key, task.name): (run_tuning, task, key, tuned, threads) for key, task in product(keys, ready)}
    for (key, name), rates, error in side_by_side(jobs, calls):
        say(f"{key} {name}: {error or rates}")
        if error is None:
            best = max(rates, key=lambda lr: (rates[lr], -lr))
            tuned.setdefault(key, {})[name] = {"lr": best, "held_out": rates}
            SETTINGS.write_text(json.dumps(dict(sorted(tuned.items())), indent=1) + "\n")


def run(keys: list[str], chosen: list[Task], seeds: list[int], out: Path, jobs: int, threads: int) -> None:
    backbone = clipadapt.load_backbone()
    tuned = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    facts = {
        "clipadapt": clipadapt.__version__,
        "git": revision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "backbone": backbone.fingerprint,
        "threads": threads,
    }
    rows = {identity(row): row for row in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
    wanted: list[dict[str, Any]] = []  # what a line says before it is run
    calls: dict[int, tuple[Any, ...]] = {}
    for task in chosen:
        first = len(wanted)
        for key, seed in product(keys, seeds):
            method = configured(key, task, task.support(seed), seed, tuned, None)
            settings = json.loads(json.dumps(recipe(method)["hyperparameters"]))
            wanted.append({**facts, "task": task.name, "method": key, "seed": seed, "hyperparameters": settings})
        missing = [i for i in range(first, len(wanted)) if "seconds" not in rows.get(identity(wanted[i]), {})]
        if missing:
            task = at_hand(task, backbone)
        for i in missing:
            key, seed = wanted[i]["method"], wanted[i]["seed"]
            calls[i] = (run_cell, task, configured(key, task, task.support(seed), seed, tuned, None), seed, threads)
    with open(out, "a") as file:
        for number, (i, result, error) in enumerate(side_by_side(jobs, calls), start=1):
            row = wanted[i] | (result if error is None else {"error": f"{type(error).__name__}: {error}"})
            rows[identity(row)] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            figures = {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}
            say(f"[{number}/{len(calls)}] {row['task']} {row['method']} {row['seed']}: {row.get('error', figures)}")
    print_tables([rows[identity(row)] for row in wanted], [task.name for task in chosen])


def identity(row: dict[str, Any]) -> str:
    facts = (row[name] for name in ("backbone", "task", "method", "seed", "hyperparameters"))
    return json.dumps([*facts], sort_keys=True)


def revision() -> str:
    """The commit of the library; with a + where its code was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "../src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -- tables ----------------------------------------------------------------------------------------------------------


def print_tables(rows: list[dict[str, Any]], names: list[str]) -> None:
    keys = list(dict.fromkeys(row["method"] for row in rows))
    done = [row for row in rows if "error" not in row]
    halves = [name for name in names if TASKS[name] == "base-to-new"]
    averaged = [name for name in AVERAGED if name in names]
    others = [name for name in names if TASKS[name] != "base-to-new"]

    def mean(key: str, name: str, what: str) -> float | None:
        values = [row[what] for row in done if row["method"] == key and row["task"] == name]
        return fmean(values) if values else None

    heads = ["method", "base", "new", "H of averages", "average of H"]
    heads += [f"{name}, few shots" for name in others] + ["other styles"] * ("styles" in names)
    heads += ["seconds a fit", "peak MiB", "trained"]
    print_row(heads)
    print_row(["---"] * len(heads))
    for key in keys:
        mine = [row for row in done if row["method"] == key]
        pairs = [(mean(key, name, "base"), mean(key, name, "new")) for name in averaged]
        cells = [key + "*" * any(map(told_new_names, mine))]
        if averaged and all(None not in pair for pair in pairs):
            both = [(float(base or 0), float(new or 0)) for base, new in pairs]
            shown = [fmean(base for base, _ in both), fmean(new for _, new in both)]
            cells += [percent(x) for x in (*shown, harmonic_of_averages(both), average_of_harmonics(both))]
        else:
            cells += ["–"] * 4
        cells += [percent(mean(key, name, "few_shot")) for name in others]
        cells += [percent(mean(key, "styles", "other_styles"))] * ("styles" in names)
        if mine:
            cells.append(f"{fmean(row['seconds'] for row in mine):.1f}")
            cells.append(f"{max(row['peak_mib'] for row in mine):.0f}")
            cells.append(f"{max(row['trained_parameters'] for row in mine):,}")
        print_row(cells + ["–"] * (len(heads) - len(cells)))
    for name in halves:
        print(f"\n{name}: mean ± standard deviation over seeds\n")
        print_row(["method", "base", "new", "H", "seconds a fit"])
        print_row(["---"] * 5)
        for key in keys:
            mine = [row for row in done if row["method"] == key and row["task"] == name]
            if mine:
                spread = [
                    f"{percent(fmean(values))} ± {percent(pstdev(values))}"
                    for values in ([row[half] for row in mine] for half in ("base", "new"))
                ]
                h = harmonic(fmean(row["base"] for row in mine), fmean(row["new"] for row in mine))
                print_row([key, *spread, percent(h), f"{fmean(row['seconds'] for row in mine):.1f}"])
    for row in rows:
        if "error" in row:
            print(f"\nfailed: {row['method']} on {row['task']}, seed {row['seed']}: {row['error']}")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="the folder that holds caltech101/ and coop-splits/")
    parser.add_argument("--methods", default="*", metavar="GLOB", help="which prompt methods; zero-shot always runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--tune", action="store_true", help=f"choose learning rates, into {SETTINGS.name}, and stop")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes to come
    keys, chosen = methods(options.methods), tasks(options.tasks, options.data)
    if options.tune:
        tune(keys, chosen, options.jobs, options.threads)
    else:
        run(keys, chosen, options.seeds, options.out, options.jobs, options.threads)


if __name__ == "__main__":
    main()
