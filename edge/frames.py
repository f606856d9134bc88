"""Frames: where pictures come from. A video file, one picture, a folder of pictures, or a camera.

Every source yields pictures one after another, in RGB; a frame that cannot be read is yielded as the `SourceError` that
says so, since it was captured and has to get its outcome like any other.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import av
from PIL import Image, UnidentifiedImageError

from .exceptions import SourceError

PICTURE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PICTURE_FPS = 10.0
"""Rate at which pictures are played that have none of their own."""


class Source(Protocol):
    """Something that frames come from.

    Attributes:
        name: as the user gave it.
        fps: frames per second of its own; None when it is not known.
        live: it keeps time by itself, and what isn't taken is gone.
    """

    @property
    def name(self) -> str: ...
    @property
    def fps(self) -> float | None: ...
    @property
    def live(self) -> bool: ...

    def frames(self) -> Iterator[Image.Image | SourceError]:
        """Pictures in RGB of any size, from the beginning.

        Raises:
            SourceError: it cannot be opened, or breaks off for good.
        """
        ...


def open_sources(names: Sequence[str], fps: float | None = None) -> list[Source]:
    """The sources of these names, each checked to be readable.

    Args:
        names: paths of video files, pictures, folders of pictures, camera devices.
        fps: frames per second asked of a camera.

    Raises:
        SourceError: there is none, or one cannot be read; the text names it and says what to do.
    """
    if not names:
        raise SourceError("no source of frames is given; add --source with a video, a picture, a folder or a camera")
    return [_open(name, fps) for name in names]


def _open(name: str, fps: float | None) -> Source:
    try:
        path = Path(name).expanduser()
        mode = path.stat().st_mode
    except RuntimeError as error:  # ~nobody/x.mp4
        raise SourceError(f"{name} cannot be read ({error}); give a path that exists") from error
    except OSError as error:
        if name.startswith("/dev/video"):
            raise SourceError(
                f"camera {name} is not there ({error.strerror}); `ls /dev/video*` lists those that are"
            ) from error
        raise SourceError(f"{name} cannot be read ({error.strerror}); give a path that exists") from error
    if stat.S_ISCHR(mode):
        return Camera(name, fps)
    if stat.S_ISDIR(mode):
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
        if not files:
            raise SourceError(f"folder {name} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
        return Pictures(name, files)
    if path.suffix.lower() in PICTURE_SUFFIXES:
        read_picture(path)
        return Pictures(name, [path])
    return Video(name, path)


def read_picture(path: Path) -> Image.Image:
    """One picture, read whole.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise SourceError(f"{path} is not a picture that can be read; convert it to JPEG or PNG") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SourceError(f"{path} is damaged or too large: {error}; replace it or leave it out") from error


class Pictures:
    """Picture files, one frame each."""

    live = False

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        """Keep the files in the order in which they are shown."""
        self.name, self.files, self.fps = name, list(files), PICTURE_FPS

    def frames(self) -> Iterator[Image.Image | SourceError]:
        """One picture or one error a file."""
        for path in self.files:
            try:
                yield read_picture(path)
            except SourceError as error:
                yield error


class Video:
    """A video file, by PyAV."""

    live = False

    def __init__(self, name: str, path: Path) -> None:
        """Open the file once to see that it is a video, and how fast.

        Raises:
            SourceError: it is none.
        """
        self.name, self._path = name, path
        with self._container() as container:
            rate = container.streams.video[0].average_rate or container.streams.video[0].guessed_rate
            self.fps = float(rate) if rate else PICTURE_FPS

    def frames(self) -> Iterator[Image.Image | SourceError]:
        """The frames from the beginning; a stretch that cannot be decoded is one error."""
        with self._container() as container:
            stream = container.streams.video[0]
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except av.FFmpegError as error:
                    raise SourceError(f"video {self.name} breaks off: {error}; is it complete?") from error
                if packet is None:
                    return
                try:
                    decoded = list(packet.decode())
                except av.FFmpegError as error:
                    yield SourceError(f"a frame of video {self.name} cannot be decoded: {error}")
                    continue
                for frame in decoded:
                    yield frame.to_image()

    def _container(self) -> Any:
        try:
            container = av.open(str(self._path))
        except (av.FFmpegError, OSError) as error:
            raise SourceError(f"{self.name} is no video that can be read: {error}; is the file complete?") from error
        if not container.streams.video:
            container.close()
            raise SourceError(f"{self.name} holds no video stream; give a file with pictures in it")
        return container


class Camera:
    """A camera device, by PyAV over V4L2."""

    live = True

    def __init__(self, name: str, rate: float | None) -> None:
        """Open it once to see that it is a camera, and how fast; `rate`: frames per second asked of it.

        Raises:
            SourceError: it is none, or cannot be opened.
        """
        self.name, self._rate = name, rate
        with self._container() as container:
            stream = container.streams.video[0]
            given = stream.average_rate or stream.guessed_rate
            self.fps: float | None = float(given) if given else rate

    def _container(self) -> Any:
        options = {"framerate": f"{self._rate:g}"} if self._rate else {}
        try:
            return av.open(self.name, format="v4l2", options=options)
        except PermissionError as error:
            raise SourceError(f"camera {self.name} may not be opened; add the user to the group `video`") from error
        except (av.FFmpegError, OSError, ValueError) as error:
            raise SourceError(
                f"camera {self.name} cannot be opened: {error}; is it a V4L2 camera, and does no other program use it?"
            ) from error

    def frames(self) -> Iterator[Image.Image | SourceError]:
        """Frames as the camera gives them."""
        with self._container() as container:
            try:
                for frame in container.decode(video=0):
                    yield frame.to_image()
            except (av.FFmpegError, OSError) as error:
                raise SourceError(
                    f"camera {self.name} gives no more frames: {error}; is it still plugged in?"
                ) from error
