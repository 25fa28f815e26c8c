"""Videos and cameras as a library reads and writes them: frames, times, and what cannot be opened or written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evm_deploy import load
from evm_deploy._util.packages import install_hint
from evm_deploy.data.recording import CODECS, Recording
from evm_deploy.data.video import camera_number, is_video, open_video
from evm_deploy.errors import ImageError, ToolchainError, UsageError
from tests.films import COUNT, FPS, HEIGHT, WIDTH, alike, film, frames_of, painted
from tests.toolchains import need

ROTATED = (0, 1 << 16, 0, 2**32 - (1 << 16), 0, 0, 0, 0, 1 << 30)  # a quarter to the right, in the matrix of an MP4


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_are_written_and_read_one_at_a_time_in_rgb(suffix, tmp_path):
    path = film(tmp_path / f"a{suffix}")
    with open_video(path) as opened:
        assert (opened.fps, opened.count, opened.live) == (FPS, COUNT, False)
        times, frames = zip(*opened.timed(), strict=True)
    assert np.allclose(times, np.arange(COUNT) / FPS)
    assert all(frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == np.uint8 for frame in frames)
    assert all(alike(frame, painted(number)) for number, frame in enumerate(frames))
    assert not alike(frames[0], painted(0)[..., ::-1]) and not alike(frames[0], painted(9))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_rotated_video_is_upright(clip, tmp_path):
    content = bytearray(clip.read_bytes())
    at = content.find(b"tkhd") + 44
    content[at : at + 36] = b"".join(value.to_bytes(4, "big") for value in ROTATED)
    (tmp_path / "turned.mp4").write_bytes(content)
    assert alike(frames_of(tmp_path / "turned.mp4")[0], np.rot90(painted(0), -1))


def test_predict_takes_a_video(clip, micro_bundle):
    with load(micro_bundle.path) as model, open_video(clip) as opened:
        assert model.predict(opened) == model.predict(frames_of(clip))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (48, 65)])
def test_odd_sides_get_one_more(size, tmp_path):
    frame = frames_of(film(tmp_path / "odd.mp4", 2, size))[0]
    assert frame.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)


@pytest.mark.parametrize("name", ["http:b.mp4", "concat:b.mp4", "a%03d.mp4", "街.mp4", "-a.mp4"])
def test_names_that_other_programs_take_for_more(name, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.link(clip, name)
    assert len(frames_of(Path(name))) == COUNT


def test_what_is_no_video_says_so(clip, tmp_path):
    content = clip.read_bytes()
    made = {
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"no video" * 200, "is damaged, no video, or of a codec"),
        "half.mp4": (content[: len(content) // 2], "is damaged, no video, or of a codec"),
        "codec.webm": (film(tmp_path / "a.webm").read_bytes().replace(b"V_VP9", b"V_ZZ9"), "of a codec that this"),
    }
    for name, (data, wrong) in made.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=f"video .*{name} .*{wrong}"):
            frames_of(tmp_path / name)
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    for source, wrong in {
        tmp_path / "folder.mp4": "is a folder",
        tmp_path / "pipe.mp4": "is a pipe",
        tmp_path / "gone.mp4": "does not exist",
        "rtsp://127.0.0.1/x": "is on a network",
        "http://127.0.0.1/x.mp4": "is on a network",
        "a\0b.mp4": "cannot be read",
    }.items():
        with pytest.raises(ImageError, match=wrong):
            open_video(source)


def test_a_file_that_plays_others_reaches_no_network(tmp_path, monkeypatch):
    """FFmpeg takes lists of addresses for videos, whatever their suffix is."""
    need("OpenCV")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        lists = (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{address}\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile {address}\n",
        )
        for text in lists:
            (tmp_path / "list.mp4").write_text(text)
            with pytest.raises(ImageError):
                frames_of(tmp_path / "list.mp4")
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_file_that_ends_early_gives_its_frames_first(tmp_path):
    whole = film(tmp_path / "a.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) * 4 // 5])
    read = []
    with open_video(tmp_path / "cut.avi") as opened, pytest.raises(ImageError, match=r"ends early: \d+ of about 15"):
        read.extend(opened)
    assert 1 <= len(read) < COUNT - 2 and alike(read[0], painted(0))


def test_names_of_cameras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [camera_number(each) for each in ("camera:0", "camera:12", "0", "7")] == [0, 12, 0, 7]
    assert [camera_number(each) for each in ("camera:", "camera:x", "./0", "٣", "cat.jpg", "99999")] == [None] * 6
    Path("0").write_bytes(b"a file")
    assert camera_number("0") is None and camera_number("camera:0") == 0
    assert is_video("A.MP4") and is_video("camera:3") and not is_video("0") and not is_video("a.gif")


def test_without_opencv_the_extra_is_named(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    with pytest.raises(ToolchainError) as caught:
        open_video(clip)
    assert caught.value.hint == install_hint("video") and caught.value.exit_code == 3


def test_importing_the_modules_imports_no_opencv():
    code = "import sys, evm_deploy.commands.videos; sys.exit('cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_recording_replaces_nothing_and_leaves_nothing_behind(tmp_path):
    mine = tmp_path / "a.mp4"
    mine.write_text("mine")
    with pytest.raises(UsageError, match="exists by now"):
        film(mine)
    with Recording(mine, FPS, number=True) as recording:
        recording.write(painted(0), 0)
        assert recording.saved is None and not (tmp_path / "a-2.mp4").exists()
    assert recording.saved == tmp_path / "a-2.mp4" and len(frames_of(recording.saved)) == 1
    with (
        pytest.raises(UsageError, match=r"has frames of 64x48: the source goes on with 65x48"),
        Recording(tmp_path / "b.mp4", FPS) as recording,
    ):
        recording.write(painted(0), 0)
        recording.write(painted(1, HEIGHT, WIDTH + 1), 1)
    with Recording(tmp_path / "c.mp4", FPS) as recording:
        pass
    assert recording.saved is None
    assert mine.read_text() == "mine" and sorted(each.name for each in tmp_path.iterdir()) == ["a-2.mp4", "a.mp4"]


def test_a_full_disk_is_noticed(tmp_path):
    """OpenCV writes on without a word."""
    need("OpenCV")
    import resource

    noise = np.random.default_rng(0).integers(0, 255, (40, 128, 128, 3), np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UsageError, match="is the disk full"), Recording(tmp_path / "a.mp4", FPS) as recording:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
            for number, frame in enumerate(noise):
                recording.write(frame, number / FPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
