"""Capture: plays sources in a thread of its own, at a frame rate or on demand."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from .exceptions import SourceError
from .frames import Source

Picture = Image.Image | SourceError

AHEAD = 2
"""Frames that are decoded ahead when they are taken on demand."""

BEHIND_S = 1.0
"""A source that is behind its schedule by more than this starts a new schedule instead of hurrying after."""


@dataclass(frozen=True, slots=True)
class Captured:
    """One captured frame: a picture in RGB or the reason why there is none, and when (clock, seconds)."""

    picture: Picture
    at: float


@dataclass(frozen=True, slots=True)
class _End:
    problem: SourceError | None


class Capture:
    """Hands over one frame after another.

    Paced (`on_demand` false): each frame when it is due, whether or not the one before was used. On demand: one frame a
    `request`. Frames are decoded ahead in both, so that decoding a file does not count as the device's time.
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
            on_frame, on_end: called in the capture thread or within `request`; `on_end` once, after the last frame,
                with what went wrong if something did.
        """
        self._sources, self._fps, self._on_demand, self._loop = sources, fps, on_demand, loop
        self._max_frames, self._clock, self._on_frame, self._on_end = max_frames, clock, on_frame, on_end
        self._stopped, self._space = threading.Event(), threading.Semaphore(AHEAD)
        self._give = self._offer if on_demand else self._hand_over
        self._lock, self._ahead, self._wanted = threading.Lock(), deque[Picture | _End](), False
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def request(self) -> None:
        """Ask for one more frame; if one is decoded already it is handed over before this returns."""
        with self._lock:
            if not self._ahead:
                self._wanted = True
                return
            ready = self._ahead.popleft()
        self._space.release()
        self._hand_over(ready)

    def stop(self) -> None:
        """Hand over no more frames; does not wait for the thread."""
        self._stopped.set()
        self._space.release()

    def _run(self) -> None:
        problem: SourceError | None = None
        try:
            self._play()
        except SourceError as error:
            problem = error
        except Exception as error:  # a decoder's surprise must end in a message, not in a silent thread
            problem = SourceError(f"reading frames failed: {error!r}")
        self._give(_End(problem))

    def _play(self) -> None:
        due = self._clock()
        for count, (source, picture) in enumerate(self._pictures(), 1):
            if self._on_demand:
                self._space.acquire()
            elif not source.live:
                rate = self._fps or source.fps
                now = self._clock()
                due = now if now - due > BEHIND_S else due
                if due > now:
                    self._stopped.wait(due - now)
                due += 1 / rate if rate else 0.0
            if self._stopped.is_set():
                return
            self._give(picture)
            if count == self._max_frames:
                return

    def _offer(self, item: Picture | _End) -> None:
        """To who waits for it, else into what is decoded ahead."""
        with self._lock:
            if not self._wanted:
                self._ahead.append(item)
                return
            self._wanted = False
        self._space.release()
        self._hand_over(item)

    def _hand_over(self, item: Picture | _End) -> None:
        if isinstance(item, _End):
            self._on_end(item.problem)
        else:
            self._on_frame(Captured(item, self._clock()))

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
