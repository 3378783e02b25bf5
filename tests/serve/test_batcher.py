"""Micro-batching: what goes together, what is refused, what fails alone, and that nothing accepted is lost."""

import asyncio
import threading
import time

import pytest

from clipadapt.serve.batcher import Batcher, Full, Late


class Double:
    """A task that notes its batches."""

    def __init__(self, seconds=0.0):
        self.seconds, self.batches, self.threads = seconds, [], set()

    def __call__(self, items):
        time.sleep(self.seconds)
        self.batches.append(list(items))
        self.threads.add(threading.current_thread().name)
        if "bad" in items:
            raise ValueError("bad item")
        return [2 * item for item in items]


def run(scenario, **options):
    async def inside():
        async with Batcher(**options) as batcher:
            return await scenario(batcher)

    return asyncio.run(inside())


def test_requests_share_batches_in_the_order_of_their_arrival():
    double = Double()

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.ask(double, [3 * n, 3 * n + 1, 3 * n + 2]) for n in range(6)))

    answers = run(scenario, size=8, wait=0.2)
    assert answers == [[6 * n, 6 * n + 2, 6 * n + 4] for n in range(6)]
    assert [len(batch) for batch in double.batches] == [8, 8, 2]
    assert [item for batch in double.batches for item in batch] == list(range(18))
    assert len(double.threads) == 1


def test_other_tasks_are_other_batches_and_do_not_starve():
    one, two = Double(), Double()

    async def scenario(batcher):
        return await asyncio.gather(batcher.ask(one, [1, 2]), batcher.ask(two, [3]), batcher.ask(one, [4]))

    assert run(scenario) == [[2, 4], [6], [8]]
    assert one.batches == [[1, 2, 4]]
    assert two.batches == [[3]]


def test_an_item_fails_alone():
    double = Double()

    def prepare(item):
        if item == "unreadable":
            raise KeyError(item)
        return item

    async def scenario(batcher):
        return await asyncio.gather(batcher.ask(double, [1, "bad", 2]), batcher.ask(double, ["unreadable", 3], prepare))

    (first, bad, second), (unreadable, third) = run(scenario)
    assert (first, second, third) == (2, 4, 6)
    assert isinstance(bad, ValueError)
    assert isinstance(unreadable, KeyError)


def test_preparing_runs_beside_the_model():
    double = Double(seconds=0.05)
    threads = set()

    def prepare(item):
        threads.add(threading.current_thread().name)
        return item

    async def scenario(batcher):
        return await batcher.ask(double, [1, 2], prepare)

    assert run(scenario) == [2, 4]
    assert not threads & double.threads


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    double = Double(seconds=0.05)

    async def scenario(batcher):
        first = asyncio.create_task(batcher.ask(double, [1, 2, 3]))
        await asyncio.sleep(0)
        with pytest.raises(Full) as refused:
            await batcher.ask(double, [4, 5])
        assert await batcher.ask(double, [6]) == [12]  # it fits
        assert await first == [2, 4, 6]
        assert batcher.in_hand == 0
        return refused.value.retry_after

    assert 1 <= run(scenario, limit=4) <= 60
    assert sorted(item for batch in double.batches for item in batch) == [1, 2, 3, 6]


def test_a_passed_deadline_frees_the_place_and_spares_the_work():
    slow, double = Double(seconds=0.3), Double()

    async def scenario(batcher):
        busy = asyncio.create_task(batcher.ask(slow, [1]))
        await asyncio.sleep(0.05)
        with pytest.raises(Late):
            await batcher.ask(double, [2])
        with pytest.raises(Late):
            await busy
        assert batcher.in_hand == 0
        batcher.deadline = 5.0
        return await batcher.ask(double, [3])

    assert run(scenario, deadline=0.1, wait=0.0) == [6]
    assert double.batches == [[3]]  # nobody waited for 2 any more


def test_stopping_answers_what_was_accepted_and_refuses_the_rest():
    double = Double(seconds=0.01)

    async def scenario():
        batcher = Batcher(size=2)
        await batcher.__aenter__()
        accepted = [asyncio.create_task(batcher.ask(double, [n], lambda item: item)) for n in range(20)]
        await asyncio.sleep(0)
        stopping = asyncio.create_task(batcher.__aexit__())
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await batcher.ask(double, [99])
        await stopping
        return [task.result() for task in accepted]

    assert asyncio.run(scenario()) == [[2 * n] for n in range(20)]


def test_the_event_loop_stays_free_while_the_model_runs():
    async def scenario(batcher):
        running = asyncio.create_task(batcher.ask(Double(seconds=0.3), [1]))
        ticks = 0
        while not running.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert run(scenario) > 5
