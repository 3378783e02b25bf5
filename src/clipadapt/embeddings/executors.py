"""Who makes the parts of an embedding: this process, local processes, or a Ray cluster; all make the same parts.

A worker holds one model and makes one part after another. A part that fails, or whose worker dies, spoils only itself:
the others are made, and the next run makes those that are missing.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from joblib import cpu_count

from clipadapt.embeddings.format import check_same, describe, encode_shard, parts_in, read_marker
from clipadapt.embeddings.listing import Listing
from clipadapt.errors import ClipadaptError

Row = dict[str, Any]  # of a part: shard, and either rows and skipped, or error
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What a worker is told; it travels to other processes and machines.

    load     makes the backbone or image tower, once in each worker: a function that can be pickled
    listing  the pictures
    out      folder or URL of the parts
    shards   how many parts there are
    options  those of `encode_shard`
    """

    load: Callable[[], Any]
    listing: Listing
    out: str
    shards: int
    options: dict[str, Any] = field(default_factory=dict)


def shards_of(listing: Listing, out: str, wanted: int | None = None) -> int:
    """The number of parts: as `wanted`, as the folder `out` was begun, or as the listing has it."""
    if wanted is not None:
        return wanted
    begun = {count for _, count in parts_in(out)}
    return begun.pop() if len(begun) == 1 else listing.parts


def encode_shards(
    job: Job,
    *,
    only: int | None = None,
    jobs: int = 1,
    ray: str | None = None,
    gpus: int = 0,
    tower: Any = None,
    tell: Tell = lambda line: None,
) -> list[Row]:
    """Make the parts that `job.out` lacks; a row for each part that was to be made, in their order.

    Args:
        only: make this part, and no other.
        jobs: workers at a time, each a process of its own; 1 without `ray` is this process.
        ray: run the workers on a Ray cluster: its address, "auto" for the one that runs here, or "local" for one of
            this run's own. Needs the extra `[ray]`; the cluster's machines need this library and must reach the same
            pictures and `job.out`.
        gpus: GPUs that Ray gives to each worker.
        tower: what `job.load` gives, if it is at hand.
        tell: gets a line for each part that ends.

    Raises:
        ArtifactError: `job.out` was begun with other pictures, another model or another number of parts.
    """
    tower = job.load() if tower is None else tower
    made_of = describe(tower, job.listing, job.shards, job.options.get("fast_decode", False))
    done = parts_in(job.out)
    for marker in list(done.values())[:1]:  # parts of one folder agree with each other
        check_same(read_marker(marker), made_of, job.out)
    wanted = range(job.shards) if only is None else [only]
    missing = [shard for shard in wanted if (shard, job.shards) not in done]
    rows = [{"shard": shard, "done": True} for shard in wanted if shard not in missing]
    if not missing:
        return rows
    jobs = min(jobs, len(missing))
    made: Iterator[Row]
    if ray is None and jobs == 1:
        worker = Worker(job, tower=tower)
        made = map(worker.run, missing)
    else:
        del tower  # each worker has its own
        made = _side_by_side(_OnRay(ray, job, jobs, gpus) if ray else _Processes(job, jobs), missing, jobs)
    for row in made:
        rows.append(row)
        tell(one_line(row, job.shards))
    return sorted(rows, key=lambda row: row["shard"])


def one_line(row: Row, shards: int) -> str:
    """What became of a part, for people."""
    what = f"shard {row['shard']} of {shards}"
    if "error" in row:
        return f"{what} failed: {row['error']}"
    skipped = f", {row['skipped']:,} skipped" if row["skipped"] else ""
    return f"{what}: {row['rows']:,} pictures{skipped}"


class Worker:
    """One model that makes parts."""

    def __init__(self, job: Job, threads: int | None = None, tower: Any = None) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self._job = job
        self._tower = job.load() if tower is None else tower
        self._options = ({} if threads is None else {"workers": threads}) | job.options

    def run(self, shard: int) -> Row:
        """Make a part; what went wrong is in the row."""
        job = self._job
        try:
            marker = encode_shard(self._tower, job.listing, job.out, (shard, job.shards), **self._options)
            state = read_marker(marker)
        except ClipadaptError as error:
            return {"shard": shard, "error": str(error)}
        except Exception as error:
            return {"shard": shard, "error": f"{type(error).__name__}: {error}"}
        return {"shard": shard, "rows": state["rows"], "skipped": len(state["skipped"])}


def _side_by_side(run: Any, shards: list[int], jobs: int) -> Iterator[Row]:
    """Rows as their parts end; each of the `jobs` threads drives a worker of its own."""
    pool = ThreadPoolExecutor(jobs)
    with closing(run):
        try:
            for future in as_completed([pool.submit(run, shard) for shard in shards]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Processes:
    """Local processes, one for each thread that calls; one that dies is replaced."""

    def __init__(self, job: Job, jobs: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._job, self._threads = job, max(1, cpu_count() // jobs)
        self._own = threading.local()
        self._started: list[Any] = []

    def __call__(self, shard: int) -> Row:
        if getattr(self._own, "process", None) is None:
            self._own.pipe, there = self._context.Pipe()
            self._own.process = self._context.Process(
                target=_serve, args=(there, self._job, self._threads), daemon=True
            )
            self._own.process.start()
            self._started.append(self._own.process)
            there.close()
        try:
            self._own.pipe.send(shard)
            return self._own.pipe.recv()
        except (EOFError, OSError):
            process, self._own.process = self._own.process, None
            process.join()
            code = process.exitcode
            return {"shard": shard, "error": f"its process ended (exit code {code}), perhaps for lack of memory"}

    def close(self) -> None:
        for process in self._started:
            process.kill()


def _serve(pipe: Any, job: Job, threads: int) -> None:
    try:
        worker = Worker(job, threads)
        while True:
            pipe.send(worker.run(pipe.recv()))
    except (EOFError, KeyboardInterrupt):
        return


class _OnRay:
    """Actors of a Ray cluster, one for each thread that calls; one that dies is replaced."""

    def __init__(self, address: str, job: Job, jobs: int, gpus: int) -> None:
        try:
            import ray
        except ImportError:
            raise ClipadaptError('Running on Ray needs an extra: pip install "clipadapt[ray]".') from None
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            cores = max(jobs, cpu_count())
            own: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address, log_to_driver=False, **own)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ClipadaptError(f"Ray cannot be reached at {address!r}: {error}") from None
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._threads = _threads_each(machines, jobs, gpus)
        if not self._threads:  # Ray would wait for ever
            self.close()
            what = "a core and a GPU each" if gpus else "a core each"
            raise ClipadaptError(f"The Ray cluster has no room for {jobs} workers with {what}; ask for fewer jobs.")
        self._actor = ray.remote(num_cpus=self._threads, num_gpus=gpus, max_restarts=0)(Worker)
        self._job = ray.put(job)
        self._own = threading.local()

    def __call__(self, shard: int) -> Row:
        if getattr(self._own, "worker", None) is None:
            self._own.worker = self._actor.remote(self._job, self._threads)
        try:
            return self._ray.get(self._own.worker.run.remote(shard))
        except self._ray.exceptions.RayError as error:
            self._own.worker = None
            return {"shard": shard, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


def _threads_each(machines: list[dict[str, float]], jobs: int, gpus: int) -> int:
    """The most cores that each of `jobs` workers can have, none of them spread over machines; 0 if there is no room."""

    def room(cores: int) -> int:
        return sum(
            int(min(machine.get("CPU", 0) // cores, machine.get("GPU", 0) // gpus if gpus else jobs))
            for machine in machines
        )

    most = int(max((machine.get("CPU", 0) for machine in machines), default=0))
    return next((cores for cores in range(most, 0, -1) if room(cores) >= jobs), 0)
