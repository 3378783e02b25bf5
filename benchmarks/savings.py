"""What the shortcuts of feature methods save: time and memory against the plain computation, side by side in one run.

    python benchmarks/savings.py                        # all cases; appends to benchmarks/savings.jsonl
    python benchmarks/savings.py --cases ape-similarity transclip-density

Each side of a case runs in a process of its own, so that its peak memory is its own, above what inputs and library
hold; one thread, and its processor time, which other programs hardly change. A line a case: ratio_time and
ratio_memory (plain / ours), max_rel_diff of the results (relative to the largest value), same_optimum where a setting
is chosen, and the seconds and MiB behind them. `measured` says which share of the plain computation was run, where all
of it would take hours: its seconds are then divided by that share, and results are compared on `checked`.

tip-adapter-search   200 x 20 settings on 200 validation images, 1,000 classes x 16 shots, D 512: `best_cache`, against
                     the published loop that computes affinities, cache and zero-shot logits again for each setting
tip-adapter-sweep    the same, with `hits_along` in the place of the 20 values of alpha, and sums by class in the place
                     of a product with one-hot labels
ape-similarity       `similarity` of 1,000 classes x 17 members, D 512, against the loop over pairs of classes
transclip-density    `log_density` and `gaussians` of 1,000 images x 1,000 classes, D 512, against differences
                     (n, 1000, 512), 100 images at a time (the official code takes 2,500 at a time)
proker-path          100 lambdas: `ridge_path` of 1,600 images x 100 classes, 200 queries, against a solution for each
tip-x-divergence     KL of 200 queries x 1,600 images over 100 classes: two products, against (n, 1600, 100) terms
transclip-16000      peak of a fit: 16,000 labelled and 16,000 unlabelled images, 1,000 classes, D 512 (ours alone)
proker-16000         peak of a fit on 16,000 images and of 1,000 predictions, 1,000 classes, D 512 (ours alone)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from clipadapt.methods import create
from clipadapt.methods.training_free_few_shot.ape import class_means
from clipadapt.methods.training_free_few_shot.proker import kernel, ridge, ridge_path
from clipadapt.methods.training_free_few_shot.transclip import gaussians, log_density
from clipadapt.nn.channels import similarity
from clipadapt.training.cache_search import best_cache

LOG = Path(__file__).with_suffix(".jsonl")
SETTINGS = [(i * 6.9 / 200 + 0.1, j * 2.9 / 20 + 0.1) for i in range(200) for j in range(20)]  # (beta, alpha)
Result = tuple[Callable[[], Any], float]  # what is timed, and which share of the whole computation it is


def clustered(classes: int, per_class: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features (classes * per_class, dim) around unit class texts (classes, dim), and labels: class by class."""
    texts = normalize(torch.randn(classes, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = normalize(torch.randn(len(labels), dim, generator=torch.Generator().manual_seed(seed)), dim=1)
    return normalize(0.3 * texts[labels] + noise, dim=1), labels, texts


def published_search(
    x: Tensor, keys: Tensor, values: Tensor, texts: Tensor, y: Tensor, settings: list[tuple[float, float]]
) -> tuple[float, float]:
    best, chosen = 0.0, (0.0, 0.0)
    for beta, alpha in settings:
        affinity = x @ keys.T
        cache = ((-1) * (beta - beta * affinity)).exp() @ values
        logits = 100.0 * x @ texts.T + alpha * cache
        accuracy = (logits.argmax(1) == y).double().mean().item()
        if accuracy > best:
            best, chosen = accuracy, (beta, alpha)
    return chosen


def sweep(x: Tensor, keys: Tensor, labels: Tensor, texts: Tensor, y: Tensor) -> tuple[float, float]:
    """`best_cache` by intervals of alpha; sums over the members of a class instead of a product with one-hot labels."""
    from clipadapt.training.search import hits_along

    zero_shot, affinity = (100 * x @ texts.T)[None], x @ keys.T
    alphas = torch.tensor([j * 2.9 / 20 + 0.1 for j in range(20)])
    best, chosen = -1, (0.0, 0.0)
    for i in range(200):
        beta = i * 6.9 / 200 + 0.1
        cache = torch.zeros(len(x), len(texts)).index_add_(1, labels, (beta * affinity - beta).exp())
        hits = hits_along(zero_shot, cache, y, alphas)[0]
        if hits.max() > best:
            best, chosen = int(hits.max()), (beta, float(alphas[hits.argmax()]))
    return chosen


def tip_adapter(side: str, small: bool, swept: bool = False) -> Result:
    classes, queries = (40, 80) if small else (1000, 200)
    keys, labels, texts = clustered(classes, 16, 512, seed=1)
    x, y, _ = clustered(classes, 2, 512, seed=2)
    rows = torch.linspace(0, len(x) - 1, queries).long()
    x, y, values = x[rows], y[rows], one_hot(labels, classes).float()
    if side == "plain":
        settings = SETTINGS if small else SETTINGS[:: len(SETTINGS) // 8]
        return lambda: published_search(x, keys, values, texts, y, settings), len(settings) / len(SETTINGS)
    if swept:
        return lambda: sweep(x, keys, labels, texts, y), 1.0
    return lambda: best_cache(100 * x @ texts.T, x @ keys.T, values, y), 1.0


def tip_adapter_sweep(side: str, small: bool) -> Result:
    return tip_adapter(side, small, swept=True)


def ape(side: str, small: bool) -> Result:
    classes = 40 if small else 1000
    images, labels, texts = clustered(classes, 16, 512, seed=1)
    members = torch.cat([texts[:, None], images.view(classes, 16, 512)], dim=1)  # (C, 17, D)
    values = one_hot(labels, classes).float()
    if side == "ours":
        return lambda: similarity(class_means(texts, images, values)), 1.0
    firsts = range(classes) if small else range(2)

    def loop() -> Tensor:
        total, count = torch.zeros(512, dtype=torch.float64), 0
        for i in firsts:
            for j in range(classes):
                if i != j:
                    total += (members[i][:, None] * members[j][None]).mean((0, 1))
                    count += 1
        return total / count

    return loop, len(firsts) / classes


def transclip(side: str, small: bool) -> Result:
    x, _, texts = clustered(1000, 1, 512, seed=1)
    z, variance = (20 * x @ texts.T).softmax(1), torch.linspace(0.5, 2, 512) / 512
    none, no_labels = x[:0], torch.empty(0, 1000)
    if side == "ours":
        return lambda: (log_density(x, texts, variance), *gaussians(x, z, none, no_labels, 0.0)), 1.0

    def plain() -> tuple[Tensor, ...]:
        means = normalize(z.T @ x / z.sum(0)[:, None], dim=1)
        density, total = [], torch.zeros(512)
        for rows in torch.arange(len(x)).split(100):
            density.append(-0.5 * ((x[rows, None] - texts[None]) ** 2 / variance).sum(2))
            total += torch.einsum("nc,ncd->d", z[rows], (x[rows, None] - means[None]) ** 2)
        return torch.cat(density), means, total / z.sum()

    return plain, 1.0


def proker(side: str, small: bool) -> Result:
    keys, labels, texts = clustered(100, 16, 512, seed=1)
    x = clustered(100, 2, 512, seed=2)[0]
    residuals = one_hot(labels, 100) - keys @ texts.T
    gram, cross, lmbdas = kernel(keys, keys, 1.5), kernel(x, keys, 1.5), torch.linspace(0.001, 1, 100).tolist()
    if side == "ours":
        return lambda: torch.stack([c[:, ::10] for c in ridge_path(gram, cross, residuals, lmbdas, "published")]), 1.0
    return lambda: torch.stack(
        [(cross.double() @ ridge(gram, residuals, lmbda, "published"))[:, ::10] for lmbda in lmbdas]
    ), 1.0


def tip_x(side: str, small: bool) -> Result:
    from clipadapt.nn.signatures import divergence

    keys, _, texts = clustered(100, 16, 512, seed=1)
    x = clustered(100, 2, 512, seed=2)[0]
    queries, cached = ((2 * a @ texts.T).double().log_softmax(1) for a in (x, keys))
    if side == "ours":
        return lambda: divergence(queries, cached), 1.0
    return lambda: torch.cat([(q.exp()[:, None] * (q[:, None] - cached[None])).sum(2) for q in queries.split(20)]), 1.0


def transclip_16000(side: str, small: bool) -> Result:
    (images, labels, texts), unlabelled = clustered(1000, 16, 512, seed=1), clustered(1000, 16, 512, seed=2)[0]

    def fit() -> Tensor:
        return create("transclip").fit_features(images, labels, texts, unlabelled=unlabelled).assignments_

    return fit, 1.0


def proker_16000(side: str, small: bool) -> Result:
    (images, labels, texts), queries = clustered(1000, 16, 512, seed=1), clustered(1000, 1, 512, seed=2)[0]
    return lambda: create("proker").fit_features(images, labels, texts).logits(queries), 1.0


CASES: dict[str, Callable[[str, bool], Result]] = {
    "tip-adapter-search": tip_adapter,
    "tip-adapter-sweep": tip_adapter_sweep,
    "ape-similarity": ape,
    "transclip-density": transclip,
    "proker-path": proker,
    "tip-x-divergence": tip_x,
    "transclip-16000": transclip_16000,
    "proker-16000": proker_16000,
}
ALONE = ("transclip-16000", "proker-16000")
NEEDS_SUS_X = ("tip-adapter-sweep", "tip-x-divergence")
SAMPLED = {"tip-adapter-search": "40 classes", "tip-adapter-sweep": "40 classes", "ape-similarity": "40 classes"}


def measure(case: str, side: str, small: bool) -> dict[str, Any]:
    """One side in this process: seconds of the whole computation, peak MiB above what stood before, and the result."""
    work, share = CASES[case](side, small)
    before = peak(anew=True)
    begun = time.process_time()
    result = work()
    seconds = (time.process_time() - begun) / share
    out = {"seconds": seconds, "mib": peak() - before, "gib_in_all": peak() / 1024, "measured": share}
    return out | {"result": result}


def peak(anew: bool = False) -> float:
    """The most that this process held since the last call with `anew`, in MiB (Linux)."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def in_a_process(case: str, side: str, small: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/result.pt"
        command = [sys.executable, __file__, "--one", case, side, str(int(small)), file]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return torch.load(file)


def compare(case: str) -> dict[str, Any]:
    ours = in_a_process(case, "ours", False)
    line: dict[str, Any] = {"case": case}
    if case in ALONE:
        line |= {"gib": ours["gib_in_all"], "fits_8_gib": ours["gib_in_all"] < 8}
        line |= {"ratio_time": None, "ratio_memory": None, "max_rel_diff": None, "same_optimum": None}
    else:
        plain = in_a_process(case, "plain", False)
        line |= {
            "ratio_time": plain["seconds"] / ours["seconds"],
            "ratio_memory": plain["mib"] / max(ours["mib"], 1.0),
            "max_rel_diff": None,
            "same_optimum": None,
        }
        checked = [s["result"] for s in (ours, plain)]
        if case in SAMPLED:
            checked = [in_a_process(case, side, True)["result"] for side in ("ours", "plain")]
            line["checked"] = SAMPLED[case]
        if isinstance(checked[0], tuple) and isinstance(checked[0][0], float):
            line["same_optimum"] = all(abs(a - b) < 1e-5 for a, b in zip(*checked, strict=True))
        else:
            pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in checked), strict=True)
            line["max_rel_diff"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        line |= {"seconds_plain": plain["seconds"], "mib_plain": plain["mib"], "measured": plain["measured"]}
    line |= {"seconds": ours["seconds"], "mib": ours["mib"], "threads": 1, "torch": torch.__version__}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case, side, small, file = args.one
        torch.set_num_threads(1)
        torch.save(measure(case, side, small == "1"), file)
        return
    for case in args.cases:
        if case in NEEDS_SUS_X and find_spec("clipadapt.methods.training_free_few_shot.sus_x") is None:
            print(f"{case}: skipped, this version has no sus-x", file=sys.stderr)
            continue
        line = json.dumps(compare(case))
        print(line, flush=True)
        with LOG.open("a") as log:
            log.write(line + "\n")


if __name__ == "__main__":
    main()
