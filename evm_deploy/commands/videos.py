"""Print what is found in the frames of videos and cameras, and save videos with it drawn."""

from __future__ import annotations

import os
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from evm_deploy._util.files import require_writable
from evm_deploy._util.text import count_text, escape_controls
from evm_deploy.commands.console import ended_by_signal
from evm_deploy.commands.detections import SHOWN, Asked, times
from evm_deploy.commands.rows import Rows
from evm_deploy.data.reading import read_image
from evm_deploy.data.recording import CODECS, Recording
from evm_deploy.data.video import Frame, Video, camera_number, is_video, open_video, opencv
from evm_deploy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from evm_deploy.bundle.loaded import LoadedBundle

#: FFmpeg and OpenCV write to the terminal themselves, past Python: off, unless the variables are set.
SILENT = {"OPENCV_LOG_LEVEL": "SILENT", "OPENCV_FFMPEG_LOGLEVEL": "-8"}


def check_videos(names: Sequence[str], save: Path | None) -> None:
    """Check, before work begins, that OpenCV is there if an input is a video, and that `save` fits the inputs.

    names: images, videos and cameras. Raises ToolchainError without OpenCV, UsageError for a place that does not fit.
    """
    videos = [name for name in names if is_video(name)]
    if videos:
        for name, value in SILENT.items():
            os.environ.setdefault(name, value)
        opencv()
    if not save or save.is_dir() or not (videos or save.suffix.lower() in CODECS):
        return
    known = ", ".join(CODECS)
    if not videos:
        raise UsageError(f"--save {save} is the name of a video: the inputs are images", "give a folder")
    if save.suffix and save.suffix.lower() not in CODECS:
        raise UsageError(
            f"--save {save}: evm-run writes no {save.suffix} files",
            f"give a video file ({known}), or a folder; one with a dot in its name must exist",
        )
    if save.suffix and len(names) > 1:
        raise UsageError(f"--save {save} is one video: there are {len(names)} inputs", "give a folder")
    if save.suffix and os.path.lexists(save):
        raise UsageError(f"--save {save} exists, and is not replaced", "give another name, or a folder")
    require_writable(save, "--save", folder=not save.suffix)


def watch(model: LoadedBundle, source: str, asked: Asked, rows: Rows) -> Iterator[str]:
    """Predict the frames of a video file or a camera. Yields a line for the first frame of each second, and a summary.

    The summary has the number of frames, frames per second and median times; with --json it goes to stderr. rows:
    gets a row for each frame. With `asked.save` the frames are drawn into a video, which gets its name at the end. The
    end of a camera is Ctrl-C. If a file ends early, or a camera is gone, the video has all frames that could be read.
    """
    shown = SHOWN[model.task.name]
    spent: dict[str, array[float]] = {}
    start, number, second = time.perf_counter(), 0, -1
    with ExitStack() as stack:
        try:
            video = stack.enter_context(open_video(source))
            ended = stack.enter_context(ended_by_signal()) if video.live else threading.Event()
            recording = stack.enter_context(_recording(video, asked.save)) if asked.save else None
            entry, of = _entry(video), f"/{video.count}" if video.count else ""
            for seconds, frame, answer, ms in _predicted(model, video, asked.top, ended):
                number += 1
                for stage, each in ms.items():
                    spent.setdefault(stage, array("d")).append(each)
                found = shown.kept(answer, asked.least)
                rows.add({**entry, "frame": number, "seconds": round(seconds, 3), **shown.facts(found, ms)})
                if recording:
                    recording.write(_drawn(model, frame, found, asked.least), seconds)
                if int(seconds) > second and not asked.json:
                    second = int(seconds)
                    line = f"{video.name} (frame {number}{of}): {shown.line(found)}   {times(ms)}"
                    yield escape_controls(line)
        except ImageError as error:
            rows.fail(_entry(source), error)
    if number:
        took = time.perf_counter() - start
        rate = f"{count_text(number, 'frame')} in {took:.1f} s, {number / took:.1f} frames/s"
        medians = times({stage: median(each) for stage, each in spent.items()})
        saved = f", saved as {recording.saved}" if recording else ""
        line = escape_controls(f"{video.name}: {rate}{saved}   median: {medians}")
        if not asked.json:
            yield line
        elif not asked.quiet:
            print(line, file=sys.stderr)


def _predicted(
    model: LoadedBundle, video: Video, top: int, ended: threading.Event
) -> Iterator[tuple[float, Frame, Any, Mapping[str, float]]]:
    """Yield time and pixels of each frame, its answer and its times in ms, until the video or `ended` ends it.

    Frames of a file are predicted in batches as large as the bundle takes; those of a camera do not wait for others.
    """
    batch = model.manifest.batch
    for part in _parts(video, batch.min if video.live else batch.max or 1):
        answers = model.predict([frame for _, frame in part], top=top)
        ms = {stage: each / len(part) for stage, each in model.spent_ms.items()}
        for (seconds, frame), answer in zip(part, answers, strict=True):
            yield seconds, frame, answer, ms
        if ended.is_set():
            return


def _parts(video: Video, size: int) -> Iterator[list[tuple[float, Frame]]]:
    """Yield the frames in lists of `size`, all that can be read. Raises the error of the video after them."""
    part: list[tuple[float, Frame]] = []
    try:
        for each in video.timed():
            part.append(each)
            if len(part) == size:
                yield part
                part = []
    except ImageError:
        if part:
            yield part
        raise
    if part:
        yield part


def _drawn(model: LoadedBundle, frame: Frame, found: Any, least: float) -> Frame:
    """Return a copy of a frame with what was found drawn on it."""
    assert model.task.draw  # checked by the caller
    drawn: Frame = np.asarray(model.task.draw(read_image(frame), found, least))
    return drawn


def _recording(video: Video, save: Path) -> Recording:
    """Return the drawn video: the file `save`, or a file in this folder with a name that is free there."""
    if save.suffix and not save.is_dir():
        return Recording(save, video.fps)
    name = Path(video.name.replace(":", "-") if video.live else video.name)
    suffix = name.suffix.lower() if name.suffix.lower() in CODECS else ".mp4"
    return Recording(save / f"{name.stem}{suffix}", video.fps, number=True)


def _entry(source: str | Video) -> dict[str, Any]:
    """Return the key and name of a source in its rows: {"video": path} or {"camera": number}."""
    name = source if isinstance(source, str) else source.name
    camera = camera_number(name)
    return {"video": name} if camera is None else {"camera": camera}
