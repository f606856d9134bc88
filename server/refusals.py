"""Refusals that are written together.

Under overload most of what a server writes is refusals, and to write one costs more than to decide it: a message, a
system call, and gRPC's word that it is done, which wakes a thread and the event loop. On a stream that sends more than
it is answered several come up within a moment. They wait for its end and go in one message, to devices that said
that they read such (`Hello.several`); each has its own status and its own times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ..protos import messages
from ..protos.messages import Result, Status

AFTER_S = 0.002
"""How long a refusal waits for others, in seconds."""

BETWEEN_S = 0.01
"""The same where there is one core for everything: messages are read there while no batch runs, and refusals are
written before the next one begins."""


class Moment:
    """Calls what is due soon, all of it at once: one timer for all streams."""

    def __init__(self, after_s: float) -> None:
        """Nothing is due; a moment lasts `after_s` seconds from what is due first."""
        self._after_s = after_s
        self._due: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def soon(self, what: Callable[[], None]) -> None:
        """Call it when the moment is over, once for each time that it is said."""
        self._due.append(what)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._after_s, self.over)

    def over(self) -> None:
        """Call all that is due now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due, self._due = self._due, []
        for what in due:
            what()


class Refusals:
    """Of one stream: refused frames whose results are not written yet."""

    def __init__(self, several: bool) -> None:
        """There are none.

        Args:
            several: the device reads several results of one response; else each gets its own.
        """
        self._several = several
        self._response: messages.StreamResponse | None = None
        self._results: list[tuple[float, messages.ResultMessage]] = []
        self._single: list[messages.StreamResponse] = []

    def __len__(self) -> int:
        """How many wait."""
        return len(self._results)

    def add(self, received: float, frame_id: int, status: Status, text: str, queue_depth: int, retry_ms: int) -> None:
        """One more, of a frame that came at `received`."""
        messages.refusal_message(self._next(received), frame_id, status, text, queue_depth, retry_ms)

    def add_result(self, received: float, result: Result) -> None:
        """One more that was not refused at first sight."""
        messages.fill_result(self._next(received), result)

    def take(self, now: float) -> Sequence[messages.StreamResponse]:
        """What there is to write at `now`, by the clock that says when frames were received; then there is nothing."""
        for received, message in self._results:
            message.timing.total_us = messages.micros(now - received)
        responses = [self._response] if self._response is not None else self._single
        self._response, self._results, self._single = None, [], []
        return responses

    def _next(self, received: float) -> messages.ResultMessage:
        if self._several:
            if self._response is None:
                self._response = messages.StreamResponse()
            message = self._response.results.results.add()
        else:
            self._single.append(messages.StreamResponse())
            message = self._single[-1].result
        self._results.append((received, message))
        return message
