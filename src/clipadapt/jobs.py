"""Parallel tasks, in local processes or on a Ray cluster; if one fails or its process dies, the others go on.

A *runner* is called with one task and gives its result; each thread that calls it has its own worker. What went
wrong with the process (it died, it took too long) is a result too: `{"error": reason}`. `side_by_side` calls a runner
from several threads:

    with closing(Processes(make)) as run, closing(side_by_side(run, tasks, jobs=4)) as results:
        for key, result in results:
            ...
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from joblib import cpu_count

from clipadapt.errors import ClipadaptError

Key = TypeVar("Key")
Result = dict[str, Any]
Work = Callable[[Any], Result]  # one task -> its result


def threads_each(jobs: int) -> int:
    """Threads of each of `jobs` workers on this machine: its cores divided evenly, at least 1."""
    return max(1, cpu_count() // jobs)


def side_by_side(run: Work, tasks: Mapping[Key, Any], jobs: int) -> Generator[tuple[Key, Result], None, None]:
    """(key, result) of each task as it ends, no more than `jobs` of them at a time.

    Closing the generator starts no further task; closing the runner after that ends those that run.
    """
    pool = ThreadPoolExecutor(jobs)
    try:
        running = {pool.submit(run, task): key for key, task in tasks.items()}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Processes:
    """Runs tasks in local processes, one for each thread that calls; one that dies or hangs is replaced.

    Args:
        make: makes what a process does with each task, once in each process; can be pickled.
        timeout: seconds that a task may take; None for as long as it takes.
        preload: modules to import once; processes are then forked from one that has them, where the system can.
    """

    def __init__(self, make: Callable[[], Work], *, timeout: float | None = None, preload: Sequence[str] = ()) -> None:
        fork = bool(preload) and sys.platform != "win32"
        self._context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
        if fork:
            self._context.set_forkserver_preload(list(preload))
        self._make, self._timeout = make, timeout
        self._own = threading.local()
        self._starting = threading.Lock()  # of processes, so that `close` misses none
        self._closed, self._started = False, list[Any]()

    def __call__(self, task: Any) -> Result:
        if getattr(self._own, "process", None) is None and not self._start():
            return {"error": "it was not begun"}
        process, pipe = self._own.process, self._own.pipe
        try:
            pipe.send(task)
            if pipe.poll(self._timeout):
                return pipe.recv()
            reason = _too_long(self._timeout)
            process.kill()
            process.join()
        except (EOFError, OSError):
            process.join()
            reason = f"its process ended (exit code {process.exitcode}), perhaps out of memory"
        self._own.process = None
        return {"error": reason}

    def _start(self) -> bool:
        with self._starting:
            if self._closed:
                return False
            self._own.pipe, there = self._context.Pipe()
            self._own.process = self._context.Process(target=_serve, args=(there, self._make), daemon=True)
            self._own.process.start()
            self._started.append(self._own.process)
            there.close()
            return True

    def close(self) -> None:
        """Kill all processes, and wait until they have ended."""
        with self._starting:
            self._closed = True
        for process in self._started:
            process.kill()
        for process in self._started:
            process.join()
            while process.exitcode is None:  # the thread that has waited for it, too, is about to say how it ended
                time.sleep(0.001)


def _serve(pipe: Any, make: Callable[[], Work]) -> None:
    try:
        work = make()
        while True:
            pipe.send(work(pipe.recv()))
    except (EOFError, KeyboardInterrupt):
        return


def _too_long(timeout: float | None) -> str:
    return f"TimeoutError: it took longer than {timeout:g} seconds"


class _Cluster:
    """A connection to a Ray cluster: that of this process if there is one, else one that `close` ends again."""

    def __init__(self, address: str, cores: int) -> None:
        """`address` may be "auto" (the cluster that runs here) or "local" (one of this run's own, of `cores` cores)."""
        try:
            import ray
        except ImportError:
            raise ClipadaptError('Running on Ray needs an extra: pip install "clipadapt[ray]".') from None
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            own: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address, log_to_driver=False, **own)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ClipadaptError(f"Ray cannot be reached at {address!r}: {error}") from None

    def close(self) -> None:
        """Leave the cluster; one of this run's own ends."""
        if self._started:
            self._ray.shutdown()

    def _reason(self, error: Exception) -> Result:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


class RayTasks(_Cluster):
    """Runs each task wherever the cluster has room; one that takes too long is cancelled, none is tried twice.

    Args:
        work: what is done with each task; can be pickled.
        threads: cores of each task.
        jobs: how many run at a time, which sets the size of a "local" cluster.
        timeout: seconds that a task may take, including its wait for room.
    """

    def __init__(self, address: str, work: Work, *, threads: int, jobs: int, timeout: float) -> None:
        super().__init__(address, jobs * threads)
        self._run = self._ray.remote(num_cpus=threads, max_retries=0)(_do)
        self._work, self._timeout = self._ray.put(work), timeout

    def __call__(self, task: Any) -> Result:
        running = self._run.remote(self._work, task)
        try:
            return self._ray.get(running, timeout=self._timeout)
        except self._ray.exceptions.GetTimeoutError:
            self._ray.cancel(running, force=True)
            return {"error": _too_long(self._timeout)}
        except self._ray.exceptions.RayError as error:
            return self._reason(error)


def _do(work: Work, task: Any) -> Result:
    return work(task)


class RayWorkers(_Cluster):
    """Runs tasks in workers on the cluster, one for each thread that calls, each with state; one that dies is replaced.

    Args:
        make: given its number of threads, makes what a worker does with each task; can be pickled.
        jobs: how many workers there are.
        gpus: GPUs of each.

    Raises:
        ClipadaptError: the cluster has no room for that many.
    """

    def __init__(self, address: str, make: Callable[[int], Work], *, jobs: int, gpus: int = 0) -> None:
        super().__init__(address, max(jobs, cpu_count()))
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._threads = cores_each(machines, jobs, gpus)
        if not self._threads:  # Ray would wait for ever
            self.close()
            what = "a core and a GPU each" if gpus else "a core each"
            raise ClipadaptError(f"The Ray cluster has no room for {jobs} workers with {what}; ask for fewer jobs.")
        self._worker = self._ray.remote(num_cpus=self._threads, num_gpus=gpus, max_restarts=0)(_Worker)
        self._make = self._ray.put(make)
        self._own = threading.local()

    def __call__(self, task: Any) -> Result:
        if getattr(self._own, "worker", None) is None:
            self._own.worker = self._worker.remote(self._make, self._threads)
        try:
            return self._ray.get(self._own.worker.run.remote(task))
        except self._ray.exceptions.RayError as error:
            self._own.worker = None
            return self._reason(error)


class _Worker:
    def __init__(self, make: Callable[[int], Work], threads: int) -> None:
        self._work = make(threads)

    def run(self, task: Any) -> Result:
        return self._work(task)


def cores_each(machines: Sequence[Mapping[str, float]], jobs: int, gpus: int = 0) -> int:
    """The most cores that each of `jobs` workers can have, none of them spread over machines; 0 if there is no room.

    `machines` are Ray's resources of each: "CPU" and "GPU".
    """

    def room(cores: int) -> int:
        return sum(
            int(min(machine.get("CPU", 0) // cores, machine.get("GPU", 0) // gpus if gpus else jobs))
            for machine in machines
        )

    most = int(max((machine.get("CPU", 0) for machine in machines), default=0))
    return next((cores for cores in range(most, 0, -1) if room(cores) >= jobs), 0)
