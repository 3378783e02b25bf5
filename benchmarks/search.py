"""What a search costs: every vector compared, and an approximate index beside it, on the same vectors in one run.

    python benchmarks/search.py [--rows N ...] [--dim D] [--index-rows N] [--others N] [--out FILE]

Prints JSON lines and adds them to FILE. The vectors are float16 unit rows around 1,000 centres, as pictures of a
thousand kinds would lie; queries are drawn like them. `exact` searches embeddings in a folder, in a process of its own
for each size, so that its memory can be told: `over_map_mib` is the peak of what is not the mapped file. `cold` is the
first search after opening. `usearch` is compared with the exact store on the same rows, as are the others on demand.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clipadapt.embeddings import Embeddings
from clipadapt.features.store import checksum
from clipadapt.search.stores.registry import open_store

PART_ROWS = 250_000
CENTRES = 1000
SPREAD = 0.7  # length of a row's own part; the centre's is 1


def rows(count: int, dim: int, seed: int) -> Iterator[np.ndarray]:
    """`count` unit rows (n, D) float16 around the centres, in pieces."""
    centres = np.random.default_rng(0).normal(size=(CENTRES, dim)).astype(np.float32) / dim**0.5
    draw = np.random.default_rng(seed)
    for first in range(0, count, 50_000):
        n = min(50_000, count - first)
        piece = draw.standard_normal((n, dim), np.float32) * np.float32(SPREAD / dim**0.5)
        piece += centres[draw.integers(CENTRES, size=n)]
        yield (piece / np.linalg.norm(piece, axis=1, keepdims=True)).astype(np.float16)


def write_embeddings(folder: Path, count: int, dim: int) -> None:
    """A folder as `clipadapt embed` writes it, of rows instead of pictures."""
    import pyarrow
    from pyarrow import parquet

    pieces, parts = rows(count, dim, seed=1), -(-count // PART_ROWS)
    for part in range(parts):
        n = min(PART_ROWS, count - part * PART_ROWS)
        matrix = np.concatenate([next(pieces) for _ in range(-(-n // 50_000))])
        stem = folder / f"part-{part:05d}-of-{parts:05d}"
        np.save(stem.with_suffix(".npy"), matrix)
        numbers = np.arange(part * PART_ROWS, part * PART_ROWS + n)
        table = pyarrow.table({"name": [f"{i}.jpg" for i in numbers], "number": numbers})
        parquet.write_table(table, stem.with_suffix(".parquet"))
        state = {"format": 1, "image_fingerprint": "drawn", "pictures": "", "shards": parts, "shard": part, "rows": n}
        state |= {"dim": dim, "checksum": checksum(matrix), "skipped": [], "model": None, "backbone": {}}
        stem.with_suffix(".json").write_text(json.dumps(state))
    os.sync()  # or the disk would still be at it while searches are timed


def median(work: Callable[[], Any], repeat: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def memory(kind: str) -> float:
    """This process's memory in MiB: RssAnon is what is its own, VmHWM the peak of all."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) / 1024


def exact(folder: str, queries: np.ndarray, repeat: int, answers: Any) -> None:
    """Puts one row into `answers`; to be run in a process of its own."""
    import threading

    import torch

    embeddings = Embeddings(folder)
    store = open_store("exact", Path(folder) / "store", embeddings.dim, embeddings)
    store.search(queries[:1], 1)  # what torch needs is loaded
    del store
    before, peak, done = memory("RssAnon"), 0.0, threading.Event()
    store = open_store("exact", Path(folder) / "store", embeddings.dim, Embeddings(folder))
    cold = median(lambda: store.search(queries[:1], 10), 1)
    one = median(lambda: store.search(queries[:1], 10), repeat)
    many = median(lambda: store.search(queries, 10), max(repeat // 3, 1))

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, memory("RssAnon"))

    watcher = threading.Thread(target=watch)  # not while anything is timed: it would be in the way
    watcher.start()
    store.search(queries[:1], 10)
    store.search(queries, 10)
    done.set()
    watcher.join()
    answers.put(
        {
            "store": "exact",
            "rows": len(embeddings),
            "dim": embeddings.dim,
            "cold_seconds": round(cold, 4),
            "seconds_for_1_query": round(one, 4),
            f"seconds_for_{len(queries)}_queries": round(many, 4),
            "one_over_each_of_many": round(one / (many / len(queries)), 1),
            "over_map_mib": round(peak - before, 1),
            "map_mib": round(len(embeddings) * embeddings.dim * 2 / 2**20, 1),
            "threads": torch.get_num_threads(),
        }
    )


def compared(kind: str, location: str, count: int, dim: int, queries: np.ndarray, repeat: int) -> dict[str, Any]:
    """Building and searching a store, beside the exact store on the same rows."""
    ids, vectors = np.arange(count), np.concatenate(list(rows(count, dim, seed=1)))
    with tempfile.TemporaryDirectory() as own:
        truth = open_store("exact", own, dim)
        truth.add(ids, vectors)
        expected = truth.search(queries, 10)[1]
        store = open_store(kind, location, dim)
        start = time.perf_counter()
        store.add(ids, vectors)
        store.persist()
        built = time.perf_counter() - start
        found = store.search(queries, 10)[1]
        one = median(lambda: store.search(queries[:1], 10), repeat)
        exact_one = median(lambda: truth.search(queries[:1], 10), repeat)
        many = median(lambda: store.search(queries, 10), max(repeat // 3, 1))
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    size = sum(file.stat().st_size for file in Path(location).rglob("*") if file.is_file()) / 2**20
    return {
        "store": kind,
        "rows": count,
        "dim": dim,
        "build_seconds": round(built, 1),
        "recall_at_10": round(sum(hits) / (10 * len(queries)), 4),
        "ms_for_1_query": round(1000 * one, 3),
        f"ms_for_each_of_{len(queries)}": round(1000 * many / len(queries), 3),
        "exact_over_this_1_query": round(exact_one / one, 1),
        "disk_mib": round(size, 1) if size else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000], help="for the exact store")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--index-rows", type=int, default=100_000, help="for usearch; 0 leaves it out")
    parser.add_argument("--others", type=int, default=0, help="rows for LanceDB and Qdrant's in-memory engine")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    queries = next(rows(arguments.queries, arguments.dim, seed=2)).astype(np.float32)

    def report(row: dict[str, Any]) -> None:
        line = json.dumps(row | {"cpus": os.cpu_count()})
        print(line, flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    context = multiprocessing.get_context("spawn")
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_embeddings(Path(folder), count, arguments.dim)
            answers = context.Queue()
            process = context.Process(target=exact, args=(folder, queries, arguments.repeat, answers))
            process.start()
            report(answers.get())
            process.join()
    for kind, count in [("usearch", arguments.index_rows), ("lance", arguments.others), ("qdrant", arguments.others)]:
        if count:
            with tempfile.TemporaryDirectory() as folder:
                location = ":memory:" if kind == "qdrant" else folder
                report(compared(kind, location, count, arguments.dim, queries, arguments.repeat))


if __name__ == "__main__":
    main()
