"""Write videos with OpenCV: a file gets its name when it is complete, and replaces no other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from evm_deploy._util.files import give_name, native_path, numbered, temporary_sibling
from evm_deploy._util.text import one_of
from evm_deploy.data.video import Frame, opencv
from evm_deploy.errors import UsageError

#: Suffix of a video file -> its codec, one that OpenCV's own packages encode on every system.
CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG", ".webm": "VP90"}


class Recording:
    """Video file that is being written, in a temporary folder beside its place. Closed by the end of its `with` block.

    If the block ends without an error, the file is checked and gets its name: `path`, or with `number` the first free
    one of `path`, `clip-2.mp4`, `clip-3.mp4` .. `saved` is this path, None before and for a video without frames. After
    an error nothing is left. fps: frames per second.
    """

    def __init__(self, path: Path, fps: float, *, number: bool = False) -> None:
        """Prepare the file. Raises UsageError for a suffix that is not one of CODECS, ToolchainError without OpenCV."""
        self._code = CODECS[one_of("suffix of a video", path.suffix.lower(), CODECS)]
        self._cv2 = opencv()
        self._path, self._number, self._fps = path, number, fps
        self._stack = ExitStack()
        self._writer: Any = None
        self._file = Path()
        self._shape: tuple[int, ...] = ()
        self._frames = 0
        self.saved: Path | None = None

    def write(self, frame: Frame, seconds: float) -> None:
        """Write an RGB frame, which is shown from its time `seconds` on. Frames come by rising time.

        The frame is repeated, or left out, where the times are not those of a constant frame rate, as of a camera. The
        first frame decides the size; odd sides get one more row or column, because codecs store even ones. Raises
        UsageError for a frame of another size, and if the file cannot be written.
        """
        if self._writer is None:
            self._open(frame)
        if frame.shape != self._shape:
            sizes = [f"{width}x{height}" for height, width, _ in (frame.shape, self._shape)]
            raise UsageError(
                f"video {self._path} has frames of {sizes[1]}: the source goes on with {sizes[0]}", "leave --save out"
            )
        padded = np.pad(frame, [*((0, side % 2) for side in frame.shape[:2]), (0, 0)], "edge")
        bgr = self._cv2.cvtColor(padded, self._cv2.COLOR_RGB2BGR)
        while self._frames <= round(seconds * self._fps):
            self._writer.write(bgr)
            self._frames += 1

    def _open(self, frame: Frame) -> None:
        height, width = (side + side % 2 for side in frame.shape[:2])
        self._shape = frame.shape
        try:
            folder = self._stack.enter_context(temporary_sibling(self._path))
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error
        self._file = Path(folder).absolute() / self._path.name
        code = self._cv2.VideoWriter_fourcc(*self._code)
        self._writer = self._cv2.VideoWriter(
            native_path(self._file), self._cv2.CAP_FFMPEG, code, self._fps, (width, height)
        )
        if not self._writer.isOpened():
            raise self._unwritable(f"OpenCV has no encoder {self._code} for {width}x{height}, {self._fps:g} frames/s")

    def _finish(self) -> None:
        """Check the file, which OpenCV writes without a word on errors, and give it its name."""
        self._writer.release()
        capture = self._cv2.VideoCapture(native_path(self._file), self._cv2.CAP_FFMPEG)
        count = min(self._frames, round(capture.get(self._cv2.CAP_PROP_FRAME_COUNT))) if capture.isOpened() else 0
        complete = count > 0 and count >= self._frames - 1  # some headers have a duration alone, rounded
        complete = complete and capture.set(self._cv2.CAP_PROP_POS_FRAMES, count - 1) and capture.read()[0]
        capture.release()
        if not complete:
            raise self._unwritable("it is not complete; is the disk full?")
        names: Sequence[Path] = (self._path,)
        for path in numbered(self._path) if self._number else names:
            try:
                give_name(self._file, path)
                self.saved = path
                return
            except FileExistsError:
                continue
            except OSError as error:
                raise self._unwritable(error.strerror or str(error)) from error
        raise UsageError(f"{self._path} exists by now", "give another name")

    def _unwritable(self, why: str) -> UsageError:
        return UsageError(f"video {self._path} cannot be written: {why}", "give another name or folder")

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._writer is None:
                return
            if error is None:
                self._finish()
            self._writer.release()
