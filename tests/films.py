"""Small videos for tests, written by the package itself, and their frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evm_deploy.data.recording import Recording
from evm_deploy.data.video import open_video
from tests.toolchains import need

FPS, COUNT = 12.5, 15
HEIGHT, WIDTH = 48, 64


def painted(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frame `number`: red, with a blue left half and a green bar that moves down."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 0] = 255
    frame[:, : width // 2] = (0, 0, 255)
    frame[2 * number : 2 * number + 4] = (0, 255, 0)
    return frame


def film(path: Path, count: int = COUNT, size: tuple[int, int] = (HEIGHT, WIDTH), fps: float = FPS) -> Path:
    need("OpenCV")
    with Recording(path, fps) as recording:
        for number in range(count):
            recording.write(painted(number, *size), number / fps)
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    with open_video(path) as opened:
        return list(opened)


def alike(frame: np.ndarray, want: np.ndarray) -> bool:
    """Whether two frames differ by no more than a codec's rounding, which blurs edges."""
    return bool(np.abs(frame.astype(int) - want).mean() < 15)
