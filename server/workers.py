"""Threads that work for the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


class Workers:
    """One thread or several that take jobs in order.

    Of an executor they have only what is needed here: a frame waits for both hand-overs, and with a
    `concurrent.futures` future between the threads they take half as long again.
    """

    def __init__(self, name: str, count: int = 1) -> None:
        """Start `count` threads."""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    async def call(self, job: Callable[[], R]) -> R:
        """The job's result, or what it raised."""
        return await self.begin(job)

    def begin(self, job: Callable[[], R]) -> asyncio.Future[R]:
        """Give a thread a job; whoever cancels the future before its turn takes it back."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def settle(result: R) -> None:
            if not future.done():  # else the caller went away
                future.set_result(result)

        def fail(error: BaseException) -> None:
            if not future.done():
                future.set_exception(error)

        def run() -> None:
            if future.done():
                return  # the caller went away before its turn
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                try:
                    result = job()
                except BaseException as error:
                    loop.call_soon_threadsafe(fail, error)
                else:
                    loop.call_soon_threadsafe(settle, result)

        self._jobs.put(run)
        return future

    async def close(self) -> None:
        """End the threads when the jobs that wait are done."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _serve(self) -> None:
        while (run := self._jobs.get()) is not None:
            run()
