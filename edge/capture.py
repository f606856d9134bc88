"""Capture: plays sources in a thread of its own, at a frame rate or on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from .exceptions import SourceError
from .frames import Source

Picture = Image.Image | SourceError

BEHIND_S = 1.0
"""A source that is behind its schedule by more than this starts a new schedule instead of hurrying after."""


@dataclass(frozen=True, slots=True)
class Captured:
    """One captured frame: a picture in RGB or the reason why there is none, and when (clock, seconds)."""

    picture: Picture
    at: float


class Capture:
    """Hands over one frame after another.

    Paced (`on_demand` false): each frame when it is due, whether or not the one before was used; the next one is
    decoded meanwhile. On demand: one frame a `request`, decoded then and not ahead, since decoding would compete with
    the frame that is being served. A frame counts as captured when it is decoded, as a camera's would.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        fps: float | None,
        on_demand: bool,
        loop: bool,
        max_frames: int | None,
        clock: Callable[[], float],
        on_frame: Callable[[Captured], None],
        on_end: Callable[[SourceError | None], None],
    ) -> None:
        """Keep what is played and how.

        Args:
            sources: played one after another.
            fps: frames per second; None for each source's own.
            on_demand: wait for `request` before each frame.
            loop: begin again after the last source.
            max_frames: stop after so many.
            clock: monotonic seconds, the one that all times of a frame are read from.
            on_frame, on_end: called in the capture thread; `on_end` once, with what went wrong if something did.
        """
        self._sources, self._fps, self._on_demand, self._loop = sources, fps, on_demand, loop
        self._max_frames, self._clock, self._on_frame, self._on_end = max_frames, clock, on_frame, on_end
        self._stopped, self._demand = threading.Event(), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def request(self) -> None:
        """Ask for one more frame."""
        self._demand.release()

    def stop(self) -> None:
        """Hand over no more frames; does not wait for the thread."""
        self._stopped.set()
        self._demand.release()

    def _run(self) -> None:
        problem: SourceError | None = None
        try:
            self._play()
        except SourceError as error:
            problem = error
        except Exception as error:  # a decoder's surprise must end in a message, not in a silent thread
            problem = SourceError(f"reading frames failed: {error!r}")
        self._on_end(problem)

    def _play(self) -> None:
        due, count, pictures = self._clock(), 0, self._pictures()
        while count != self._max_frames:
            if self._on_demand:
                self._demand.acquire()
            if self._stopped.is_set() or (found := next(pictures, None)) is None:
                return
            source, picture = found
            if not self._on_demand and not source.live:
                rate = self._fps or source.fps
                now = self._clock()
                due = now if now - due > BEHIND_S else due
                if due > now:
                    self._stopped.wait(due - now)
                due += 1 / rate if rate else 0.0
                if self._stopped.is_set():
                    return
            self._on_frame(Captured(picture, self._clock()))
            count += 1

    def _pictures(self) -> Iterator[tuple[Source, Picture]]:
        while True:
            empty = True
            for source in self._sources:
                for picture in source.frames():
                    empty = False
                    yield source, picture
            if not self._loop:
                return
            if empty:
                raise SourceError("none of the sources holds a single frame")
