"""Tasks end one by one wherever they run; one that hangs or whose process dies spoils only itself."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial

import pytest

from clipadapt.errors import ClipadaptError
from clipadapt.jobs import Processes, RayTasks, RayWorkers, cores_each, side_by_side, threads_each
from tests.ray_cluster import TOKEN


def make(threads: int = 0):
    """A worker that counts what it did."""
    done: list[object] = []

    def work(task):
        done.append(task)
        return act(task) | {"done": len(done)}

    return work


def act(task):
    if task == "hang":
        time.sleep(600)
    if task == "die":
        os._exit(3)
    return {"pid": os.getpid(), "task": task}


def test_results_come_as_tasks_end_and_no_more_than_jobs_run():
    running, most, gate = [], [], threading.Barrier(2)

    def run(task):
        running.append(task)
        most.append(len(running))
        if task in "ab":
            gate.wait(60)  # passes only if both run at the same time
        running.remove(task)
        return {"task": task}

    found = dict(side_by_side(run, {key.upper(): key for key in "abcde"}, jobs=2))
    assert found == {key.upper(): {"task": key} for key in "abcde"}
    assert max(most) == 2


def test_closing_starts_no_further_task():
    begun = []
    with closing(side_by_side(lambda task: begun.append(task) or {}, dict(enumerate(range(1000))), 1)) as results:
        next(results)
        gate = threading.Event()
    before = len(begun)
    gate.wait(0.1)
    assert len(begun) <= before + 1


@pytest.mark.parametrize("preload", [(), ("clipadapt.jobs",)])
def test_a_process_keeps_its_state_and_one_that_dies_is_replaced(preload):
    with closing(Processes(make, preload=preload)) as run:
        first, second = run("a"), run("b")
        assert first["pid"] == second["pid"] != os.getpid()
        assert [first["done"], second["done"]] == [1, 2]
        assert run("die") == {"error": "its process ended (exit code 3), perhaps out of memory"}
        third = run("c")
        assert third["pid"] != first["pid"]
        assert third["done"] == 1
    assert not multiprocessing.active_children()
    assert run("d") != {}, "a closed runner begins nothing"
    assert not multiprocessing.active_children()


def test_what_takes_too_long_is_given_up():
    with closing(Processes(make, timeout=0.5)) as run:
        assert run("hang") == {"error": "TimeoutError: it took longer than 0.5 seconds"}
    assert not multiprocessing.active_children()


def test_closing_ends_what_runs():
    run = Processes(make)
    with closing(side_by_side(run, {1: "a", 2: "hang", 3: "hang", 4: "hang"}, 2)) as results:
        assert next(results)[1]["task"] == "a"
    run.close()
    assert not multiprocessing.active_children()


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.setattr("clipadapt.jobs.cpu_count", lambda: 8)
    assert [threads_each(jobs) for jobs in (1, 2, 3, 16)] == [8, 4, 2, 1]


def test_needs_no_torch():
    code = "import sys, clipadapt.jobs; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("machines", "jobs", "gpus", "cores"),
    [
        ([{"CPU": 8.0}], 3, 0, 2),
        ([{"CPU": 8.0}, {"CPU": 8.0}], 3, 0, 4),  # 5 cores each would leave no place for the third
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], 2, 1, 4),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], 3, 1, 0),
        ([{"CPU": 2.0}], 3, 0, 0),
        ([], 1, 0, 0),
    ],
)
def test_every_worker_of_a_cluster_has_its_place(machines, jobs, gpus, cores):
    assert cores_each(machines, jobs, gpus) == cores


def test_on_ray(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with closing(RayTasks("local", partial(act), threads=1, jobs=1, timeout=180)) as run:
        assert run("a")["task"] == "a"
        assert "Worker" in run("die")["error"]
        run._timeout = 3
        assert run("hang") == {"error": "TimeoutError: it took longer than 3 seconds"}
        run._timeout = 180
        assert run("b")["task"] == "b"
        with pytest.raises(ClipadaptError, match="no room for 1 workers with a core and a GPU each"):
            RayWorkers("local", make, jobs=1, gpus=1)
        workers = RayWorkers("local", make, jobs=1)
        assert [workers("a")["done"], workers("b")["done"]] == [1, 2]
        assert "ActorDiedError" in workers("die")["error"]
        assert workers("c")["done"] == 1
        workers.close()
        assert ray.is_initialized(), "what was there before stays"
    assert not ray.is_initialized(), "what was started is stopped"
    with pytest.raises(ClipadaptError, match="cannot be reached at 'auto'"):
        RayTasks("auto", act, threads=1, jobs=1, timeout=1)
