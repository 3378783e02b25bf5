"""Batches the work of many requests: what can go through the model together does, in one thread.

Pure asyncio, without HTTP. A *task* is a hashable callable that takes items and gives one answer for each; items of
equal tasks form a batch. The number of items in hand is bounded, so a server under too much load refuses early.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Task(Hashable, Protocol):
    """Runs in the batcher's thread; an answer may be an exception, which then concerns its item alone."""

    def __call__(self, items: Sequence[Any], /) -> Sequence[Any]: ...


class Full(Exception):
    """No room for the request; after `retry_after` seconds there probably is."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("The server is busy; try again in a moment.")
        self.retry_after = retry_after


class Late(Exception):
    """The request was not answered within its deadline."""

    def __init__(self, deadline: float) -> None:
        super().__init__(f"No answer within {deadline:g} seconds.")


@dataclass(eq=False)
class _Job:
    task: Task
    item: Any
    arrived: float
    answer: asyncio.Future[Any]


class Batcher:
    """Use it as `async with Batcher() as batcher`; leaving waits until everything accepted is answered.

    Args:
        size: most items of a batch.
        wait: seconds that an item waits for others to join it.
        limit: most items in hand, from `ask` to the answer.
        deadline: seconds from `ask` to the answer.
        threads: how many prepare items while the model runs.
        observe: called with each batch's task and number of items.
    """

    def __init__(
        self,
        *,
        size: int = 32,
        wait: float = 0.005,
        limit: int = 256,
        deadline: float = 30.0,
        threads: int = 2,
        observe: Callable[[Task, int], None] | None = None,
    ) -> None:
        self.size, self.wait, self.limit, self.deadline = size, wait, limit, deadline
        self.in_hand = 0  # items
        self._observe = observe or (lambda task, items: None)
        self._seconds_an_item = 0.0  # smoothed
        self._pending: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._helpers = ThreadPoolExecutor(threads, thread_name_prefix="prepare")

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.get_running_loop()
        self._worker = self._loop.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        self._arrived.set()
        await self._idle.wait()
        self._arrived.set()
        await self._worker
        self._model.shutdown()
        self._helpers.shutdown()

    async def ask(self, task: Task, items: Sequence[Any], prepare: Callable[[Any], Any] | None = None) -> list[Any]:
        """The answers to `items`, in their order; a failed item has its exception as its answer.

        `prepare` turns each item into what the task takes, in another thread than the model's.

        Raises:
            Full: there is no room, or the batcher is being stopped.
            Late: the deadline has passed.
        """
        if self._stopping or self.in_hand + len(items) > self.limit:
            raise Full(self._retry_after())
        self.in_hand += len(items)
        self._idle.clear()
        try:
            async with asyncio.timeout(self.deadline):
                return await asyncio.gather(*(self._answer(task, item, prepare) for item in items))
        except TimeoutError:
            raise Late(self.deadline) from None
        finally:
            self.in_hand -= len(items)
            if not self.in_hand:
                self._idle.set()

    async def in_model_thread(self, work: Callable[[], T]) -> T:
        """`work()` in the model's thread, between two batches."""
        return await self._loop.run_in_executor(self._model, work)

    async def in_helper_thread(self, work: Callable[[], T]) -> T:
        """`work()` in one of the threads that prepare items, while the model runs."""
        return await self._loop.run_in_executor(self._helpers, work)

    async def _answer(self, task: Task, item: Any, prepare: Callable[[Any], Any] | None) -> Any:
        if prepare is not None:
            item = await self._loop.run_in_executor(self._helpers, _try, prepare, item)
            if isinstance(item, Exception):
                return item
        job = _Job(task, item, self._loop.time(), self._loop.create_future())
        self._pending.append(job)
        self._arrived.set()
        return await job.answer

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._pending:
                await self._run(await self._batch())
            if self._stopping and not self.in_hand:
                return

    async def _batch(self) -> list[_Job]:
        """The oldest job and those that go with it, once they are enough or have waited long enough."""
        oldest = self._pending[0]
        due = oldest.arrived + self.wait
        while (
            not self._stopping
            and (left := due - self._loop.time()) > 0
            and sum(job.task == oldest.task for job in self._pending) < self.size
        ):
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            self._arrived.clear()
        batch: list[_Job] = []
        others: deque[_Job] = deque()
        for job in self._pending:
            if job.answer.done():  # nobody waits for it any more
                continue
            (batch if job.task == oldest.task and len(batch) < self.size else others).append(job)
        self._pending = others
        return batch

    async def _run(self, batch: list[_Job]) -> None:
        if not batch:
            return
        task, items = batch[0].task, [job.item for job in batch]
        self._observe(task, len(items))
        began = self._loop.time()
        answers = await self._loop.run_in_executor(self._model, _answers, task, items)
        self._seconds_an_item += 0.2 * ((self._loop.time() - began) / len(items) - self._seconds_an_item)
        for job, answer in zip(batch, answers, strict=True):
            if not job.answer.done():
                job.answer.set_result(answer)

    def _retry_after(self) -> int:
        return min(max(math.ceil(self.in_hand * self._seconds_an_item), 1), 60)


def _try(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except Exception as error:
        return error


def _answers(task: Task, items: list[Any]) -> list[Any]:
    """The task's answers; where it fails on several items, each is tried alone, so that only the bad ones fail."""
    try:
        answers = list(task(items))
        if len(answers) != len(items):
            raise RuntimeError(f"{task!r} gave {len(answers)} answers to {len(items)} items")
        return answers
    except Exception as error:
        return [error] if len(items) == 1 else [answer for item in items for answer in _answers(task, [item])]
