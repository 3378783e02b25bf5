"""Who makes the parts of an embedding: this process, local processes, or a Ray cluster; all make the same parts.

A worker holds one model and makes one part after another. If a part fails or its worker dies, the
others are still made, and the next run makes those that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from clipadapt.embeddings.format import check_same, describe, encode_shard, parts_in, read_marker
from clipadapt.embeddings.listing import Listing
from clipadapt.errors import ClipadaptError
from clipadapt.jobs import Processes, RayWorkers, side_by_side, threads_each

Row = dict[str, Any]  # of a part: shard, and either rows and skipped, or error
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What a worker is told; it travels to other processes and machines.

    load     makes the backbone or image tower, once in each worker: a function that can be pickled
    listing  the images
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
        jobs: workers at a time, each a separate process; 1 without `ray` is this process.
        ray: run the workers on a Ray cluster: its address, "auto" for the one that runs here, or "local" for one of
            this run's own. Needs the extra `[ray]`; the cluster's machines need this library and must reach the same
            images and `job.out`.
        gpus: GPUs that Ray gives to each worker.
        tower: what `job.load` returns, if it is loaded already.
        tell: gets a line for each part that ends.

    Raises:
        ArtifactError: `job.out` was begun with other images, another model or another number of parts.
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
    made: Generator[Row, None, None]
    if ray is None and jobs == 1:
        worker = Worker(job, tower=tower)
        made = (worker(shard) for shard in missing)
    else:
        del tower  # each worker has its own
        made = _side_by_side(job, missing, jobs, ray, gpus)
    with closing(made):
        for row in made:
            rows.append(row)
            tell(one_line(row, job.shards))
    return sorted(rows, key=lambda row: row["shard"])


def one_line(row: Row, shards: int) -> str:
    """The outcome of a part, in words."""
    what = f"shard {row['shard']} of {shards}"
    if "error" in row:
        return f"{what} failed: {row['error']}"
    skipped = f", {row['skipped']:,} skipped" if row["skipped"] else ""
    return f"{what}: {row['rows']:,} images{skipped}"


class Worker:
    """One model that makes parts."""

    def __init__(self, job: Job, threads: int | None = None, tower: Any = None) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self._job = job
        self._tower = job.load() if tower is None else tower
        self._options = ({} if threads is None else {"workers": threads}) | job.options

    def __call__(self, shard: int) -> Row:
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


def _side_by_side(job: Job, shards: list[int], jobs: int, ray: str | None, gpus: int) -> Generator[Row, None, None]:
    """Rows as their parts end."""
    run: Any
    if ray is None:
        run = Processes(partial(Worker, job, threads_each(jobs)))
    else:
        run = RayWorkers(ray, partial(Worker, job), jobs=jobs, gpus=gpus)
    with closing(run), closing(side_by_side(run, {shard: shard for shard in shards}, jobs)) as results:
        for shard, row in results:
            yield {"shard": shard} | row
