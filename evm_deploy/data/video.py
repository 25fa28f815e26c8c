"""Read videos and cameras with OpenCV, one frame at a time. OpenCV is the extra `video`, imported at the first use."""

from __future__ import annotations

import math
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import native_path
from evm_deploy._util.packages import install_hint
from evm_deploy._util.text import command, count_text
from evm_deploy.errors import ImageError, ToolchainError

#: Suffixes of files that are videos, in lower case. An animated GIF is an image: its first frame.
VIDEO_SUFFIXES = frozenset(
    (".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
)
CAMERA = re.compile(r"camera:(\d{1,4})", re.ASCII)
STREAM = re.compile(r"(rtsp|rtmp|udp|srt|http)s?://", re.ASCII | re.IGNORECASE)
NUMBER = re.compile(r"\d{1,4}", re.ASCII)
UNKNOWN_FPS = 30.0  # frames per second of a source that does not tell
MOST_FPS = 1000.0  # more is no frame rate but the clock of a container
MISSING_SHARE, MISSING_FRAMES = 0.05, 2  # of a video that is whole: the length in its header is an estimate

Frame = NDArray[np.uint8]  # (H, W, 3) RGB, upright


def opencv() -> Any:
    """Return the module cv2. Raises ToolchainError if it is not installed or cannot be imported."""
    try:
        import cv2
    except ModuleNotFoundError as error:
        if error.name != "cv2":
            raise
        raise ToolchainError("OpenCV is not installed: it reads videos and cameras", install_hint("video")) from error
    except ImportError as error:  # opencv-python without a library of the desktop, such as libGL
        hint = command("pip", "install", "--force-reinstall", "opencv-python-headless")
        raise ToolchainError(f"OpenCV cannot be imported: {error}", hint) from error
    return cv2


def camera_number(source: str) -> int | None:
    """Return the number of the camera that a text names, None if it names none.

    `camera:0` is a camera. `0` is one too, unless there is a file or folder with this name.
    """
    found = CAMERA.fullmatch(source)
    if found:
        return int(found[1])
    return int(source) if NUMBER.fullmatch(source) and not os.path.lexists(source) else None


def is_video(source: str) -> bool:
    """Test whether a text names a camera, a file with the suffix of a video, or a stream, which no one opens."""
    if camera_number(source) is not None or Path(source).suffix.lower() in VIDEO_SUFFIXES:
        return True
    return bool(STREAM.match(source)) and not source.lower().startswith("http")


def open_video(source: str | os.PathLike[str] | int) -> Video:
    """Open a video file, or a camera given as its number, `0` or `camera:0`. Returns an iterable of its frames.

    The file must be on this machine: addresses of networks are not opened. Raises ImageError for what cannot be opened,
    ToolchainError without OpenCV.
    """
    if isinstance(source, int):
        return _open_camera(source)
    number = camera_number(source) if isinstance(source, str) else None
    if number is not None:
        return _open_camera(number)
    cv2, path = opencv(), Path(source)
    if STREAM.match(str(source)) and not os.path.lexists(source):
        raise ImageError(f"video {source} is on a network", "evm-deploy opens no network: give a file or a camera")
    _require_file(path)
    # absolute, or FFmpeg takes a colon in the name for an address; by FFmpeg, or OpenCV looks for numbered images
    capture = cv2.VideoCapture(native_path(path.absolute()), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise _undecodable(path, "is damaged, no video, or of a codec that this OpenCV cannot read")
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
    return Video(capture, str(path), live=False)


def _open_camera(number: int) -> Video:
    cv2 = opencv()
    capture = cv2.VideoCapture(number)
    if not capture.isOpened():
        raise ImageError(f"camera:{number} cannot be opened", _cameras_here())
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # a slow network gets the newest frame, not one that has waited
    return Video(capture, f"camera:{number}", live=True)


class Video:
    """Opened video or camera: an iterable of its frames, uint8 (H, W, 3) RGB, upright by the file's rotation.

    Frames are decoded one at a time, when they are asked for, and only once. fps: frames per second that the source
    tells, else 30. count: number of frames that the file's header tells, None if it does not, and of a camera. live:
    whether it is a camera. Closed by the end of its `with` block.
    """

    def __init__(self, capture: Any, name: str, live: bool) -> None:
        self._cv2, self._capture = opencv(), capture
        self.name, self.live = name, live
        fps, count = (capture.get(each) for each in (self._cv2.CAP_PROP_FPS, self._cv2.CAP_PROP_FRAME_COUNT))
        self.fps = fps if 0 < fps <= MOST_FPS else UNKNOWN_FPS
        self.count = round(count) if not live and math.isfinite(count) and count >= 1 else None

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames. Raises ImageError as `timed` does."""
        return (frame for _, frame in self.timed())

    def timed(self) -> Iterator[tuple[float, Frame]]:
        """Yield the time of each frame in seconds from the first one, and the frame.

        The time in a file is the frame's number divided by `fps`; that of a camera is the time of this machine. Raises
        ImageError if there are no frames, and after the last one of a file that ends early or of a camera that is gone.
        """
        number, reached, start = 0, 0.0, math.nan
        while (frame := self._next()) is not None:
            now = time.monotonic()
            start = now if number == 0 else start
            reached = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1000 * self.fps + 1
            yield (now - start if self.live else number / self.fps), frame
            number += 1
        if self.live:
            raise ImageError(f"{self.name} gives no more frames, after {count_text(number, 'frame')}", _cameras_here())
        if not number:
            raise _undecodable(Path(self.name), f"has no frame that can be decoded{self._codec()}")
        if self.count and max(number, reached) < self.count - max(MISSING_FRAMES, MISSING_SHARE * self.count):
            raise ImageError(
                f"video {self.name} ends early: {number} of about {count_text(self.count, 'frame')} can be read",
                "the file is damaged, or its copy is not complete",
            )

    def _next(self) -> Frame | None:
        """Return the next frame, None after the last one. Raises ImageError for one that OpenCV fails on."""
        try:
            there, frame = self._capture.read()
            if not there or frame is None:
                return None
            rgb: Frame = self._cv2.cvtColor(frame, self._cv2.COLOR_BGR2RGB)
            return rgb
        except self._cv2.error as error:
            raise ImageError(f"video {self.name} cannot be decoded: {error}") from error

    def _codec(self) -> str:
        """Return the codec of the file as text, such as ` (codec av01)`; empty if it is not known."""
        code = int(self._capture.get(self._cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
        letters = code.to_bytes(4, "little").decode("latin-1").strip("\0 ")
        return f" (codec {letters})" if letters.isalnum() else ""

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.release()


def _require_file(path: Path) -> None:
    """Raise ImageError unless a path is that of a file which can be read and is not empty."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            kind = "folder" if stat.S_ISDIR(facts.st_mode) else "pipe or device"
            raise ImageError(f"video {path} is a {kind}", "give a video file")
        if not facts.st_size:
            raise ImageError(f"video {path} is empty")
        path.open("rb").close()
    except FileNotFoundError as error:
        raise ImageError(f"video {path} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ImageError(f"video {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _undecodable(path: Path, why: str) -> ImageError:
    """Return the error for a video file, with a command that converts one which other programs can play."""
    converted = command("ffmpeg", "-i", path, path.with_name(f"{path.stem}-h264.mp4"))
    return ImageError(f"video {path} {why}", f"if it plays elsewhere, convert it:  {converted}")


def _cameras_here() -> str:
    """Return a sentence on the cameras of this machine, where the system lists them."""
    if sys.platform != "linux":
        return "connect it, and allow this program to use the camera"
    devices = [each for each in Path("/dev").glob("video*") if NUMBER.fullmatch(each.name[5:])]
    devices.sort(key=lambda each: int(each.name[5:]))
    if not devices:
        return "no camera is connected: there is no /dev/video0"
    if not all(os.access(each, os.R_OK | os.W_OK) for each in devices):
        return f"this user may not open {', '.join(map(str, devices))}: add the user to the group `video`"
    return f"devices here: {', '.join(f'camera:{each.name[5:]}' for each in devices)}"
