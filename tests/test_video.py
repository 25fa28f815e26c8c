"""Videos and cameras: frames, what cannot be opened, saved videos, and evm-run with each task."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evm_deploy import cli, load
from evm_deploy._util.packages import install_hint
from evm_deploy.data import video
from evm_deploy.data.recording import CODECS, Recording
from evm_deploy.data.video import camera_number, is_video, open_video, opencv
from evm_deploy.errors import ImageError, ToolchainError, UsageError
from tests.toolchains import need

FPS, COUNT = 12.5, 15
HEIGHT, WIDTH = 48, 64
ROTATED = (0, 1 << 16, 0, 2**32 - (1 << 16), 0, 0, 0, 0, 1 << 30)  # a quarter to the right, in the matrix of an MP4


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


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "clip.mp4")


def frames_of(path: Path) -> list[np.ndarray]:
    with open_video(path) as opened:
        return list(opened)


def alike(frame: np.ndarray, want: np.ndarray) -> bool:
    """Whether two frames differ by no more than a codec's rounding, which blurs edges."""
    return bool(np.abs(frame.astype(int) - want).mean() < 15)


def run(capsys, *args):
    code = cli.run_main([str(each) for each in args])
    said = capsys.readouterr()
    return code, said.out, said.err


# --------------------------------------------------------------------------------------------------------- the library


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


@pytest.mark.parametrize("name", ["a http:b.mp4", "a%03d.mp4", "街.mp4", "-a.mp4"])
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


# ------------------------------------------------------------------------------------------------------------- evm-run


def test_label_maps_of_a_video(segmenter_bundles, clip, tmp_path, capsys):
    bundle, out = segmenter_bundles["pad"], tmp_path / "out.mp4"
    code, said, err = run(capsys, bundle, clip, "--save", out)
    first, second, last = said.splitlines()
    assert code == 0, err
    assert first.startswith(f"{clip} (frame 1/15): ") and " % colour 3, " in first and "ms, inference" in first
    assert second.startswith(f"{clip} (frame 14/15): ")  # the first one after a second: 13 / 12.5
    assert last.startswith(f"{clip}: 15 frames in ") and f"frames/s, saved as {out}   median: preprocess" in last
    with open_video(out) as opened:
        assert (opened.fps, opened.count) == (FPS, COUNT)
        drawn = list(opened)
    with load(bundle) as model:
        found = model.predict(frames_of(clip))
        want = [model.task.draw(Image.fromarray(painted(i)), each, 0.0) for i, each in enumerate(found)]
    assert all(alike(frame, np.asarray(each)) for frame, each in zip(drawn, want, strict=True))
    code, _, err = run(capsys, bundle, clip, "--save", out)
    assert code == 2 and "exists, and is not replaced" in err and len(frames_of(out)) == COUNT


def test_json_has_an_entry_for_each_frame(segmenter_bundles, clip, capsys):
    code, out, err = run(capsys, segmenter_bundles["pad"], clip, "--json")
    rows = json.loads(out)
    assert code == 0 and [row["frame"] for row in rows] == list(range(1, COUNT + 1))
    assert {*rows[0]} == {"video", "frame", "seconds", "classes", "ms"} and rows[5]["seconds"] == 0.4
    assert {*rows[0]["ms"]} == {"preprocess", "inference", "postprocess"} and f"{clip}: 15 frames in" in err
    assert run(capsys, segmenter_bundles["pad"], clip, "--json", "-q")[2] == ""


def test_images_and_videos_together(segmenter_bundles, clip, tmp_path, capsys):
    """In the order given; one that cannot be read costs no other; drawn ones go to a folder."""
    Image.fromarray(painted(3)).save(tmp_path / "a.png")
    whole = film(tmp_path / "b.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) * 4 // 5])
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    (drawn / "clip.mp4").write_text("mine")
    inputs = [tmp_path / "a.png", clip, tmp_path / "gone.mp4", tmp_path / "cut.avi", tmp_path / "a.png"]
    code, out, err = run(capsys, segmenter_bundles["pad"], *inputs, "--save", drawn)
    starts = [line.partition(":")[0].partition(" (")[0] for line in out.splitlines()]
    want = [inputs[0], clip, clip, clip, inputs[3], inputs[3], inputs[0]]
    assert code == 2 and starts == [str(each) for each in want]
    assert "gone.mp4 does not exist" in err and "cut.avi ends early" in err and "2 of 5 inputs could not be read" in err
    assert sorted(each.name for each in drawn.iterdir()) == ["a-2.png", "a.png", "clip-2.mp4", "clip.mp4", "cut.avi"]
    assert (drawn / "clip.mp4").read_text() == "mine"
    assert len(frames_of(drawn / "clip-2.mp4")) == COUNT and 1 <= len(frames_of(drawn / "cut.avi")) < COUNT
    rows = json.loads(run(capsys, segmenter_bundles["pad"], *inputs[2:4], "--json")[1])
    assert "does not exist" in rows[0]["error"] and "ends early" in rows[-1]["error"] and "classes" in rows[-2]


def test_classes_of_a_video(micro_bundle, clip, capsys):
    code, out, _ = run(capsys, micro_bundle.path, clip, "--top", "2")
    assert code == 0 and out.splitlines()[0].count(" % class ") == 2
    row = json.loads(run(capsys, micro_bundle.path, clip, "--top", "2", "--json")[1])[14]
    with load(micro_bundle.path) as model:
        (answer,) = model.predict(frames_of(clip)[14], top=2)
    assert row["frame"] == 15 and row["top"] == [vars(each) for each in answer]


@pytest.mark.slow
def test_detections_of_a_video_in_batches(detector_bundles, clip, tmp_path, capsys, monkeypatch):
    from evm_deploy.bundle.loaded import LoadedBundle

    sizes, predict = [], LoadedBundle.predict

    def counted(self, images, **options):
        sizes.append(len(images))
        return predict(self, images, **options)

    monkeypatch.setattr(LoadedBundle, "predict", counted)
    bundle = detector_bundles["graph"].path
    code, out, _ = run(capsys, bundle, clip, "--json", "--min-score", "0.5", "--save", tmp_path / "out.webm")
    rows = json.loads(out)
    assert code == 0 and sizes == [0, *[2] * 7, 1] and len(frames_of(tmp_path / "out.webm")) == COUNT
    with load(bundle) as model:
        answer = predict(model, [frames_of(clip)[14]])[0]
    want = [each.label for each in answer if each.score >= 0.5]
    assert want and [each["label"] for each in rows[14]["detections"]] == want


def test_what_cannot_be_saved(segmenter_bundles, micro_bundle, clip, tmp_path, capsys):
    Image.fromarray(painted(3)).save(tmp_path / "a.png")
    maps = segmenter_bundles["pad"]
    for bundle, inputs, save, wrong in (
        (maps, [clip], "out.mpeg", "evm-run writes no .mpeg files"),
        (maps, [clip, clip], "out.mp4", "is one video: there are 2 inputs"),
        (maps, [tmp_path / "a.png"], "out.mp4", "is the name of a video: the inputs are images"),
        (maps, [clip], "a.png/out.mp4", "cannot write"),
        (micro_bundle.path, [clip], "out.mp4", "--save draws boxes and label maps: the bundle gives scores"),
    ):
        code, out, err = run(capsys, bundle, *inputs, "--save", tmp_path / save)
        assert code == 2 and wrong in err and out == "", save
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_evm_run_without_opencv(segmenter_bundles, clip, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    code, out, err = run(capsys, segmenter_bundles["pad"], clip)
    assert code == 3 and "OpenCV is not installed" in err and install_hint("video") in err and out == ""


def test_a_camera_that_is_not_there(segmenter_bundles, capsys):
    need("OpenCV")
    code, out, err = run(capsys, segmenter_bundles["pad"], "camera:873")
    assert code == 2 and "camera:873 cannot be opened\n  " in err and out == ""


class Camera:
    """A capture that shows a clip from a file, as a camera does: without a length, at its own pace.

    `at(number)` is called before each frame.
    """

    def __init__(self, capture, at):
        self.capture, self.at, self.number = capture, at, 0

    def read(self):
        self.number += 1
        self.at(self.number)
        return self.capture.read()

    def get(self, which):
        return -1.0

    def isOpened(self):  # noqa: N802
        return True

    def set(self, which, value):
        return True

    def release(self):
        self.capture.release()


@pytest.fixture
def camera(clip, monkeypatch):
    """camera(at) makes camera 0 of this machine, whose frames come every 0.1 seconds."""
    need("OpenCV")
    cv2 = opencv()
    real = cv2.VideoCapture

    def make(at):
        monkeypatch.setattr(
            cv2,
            "VideoCapture",
            lambda source, *rest: Camera(real(str(clip)), at) if source == 0 else real(source, *rest),
        )
        clock = itertools.count(100)
        monkeypatch.setattr(video.time, "monotonic", lambda: next(clock) / 10)

    return make


@pytest.mark.parametrize("name", ["camera:0", "0"])
def test_ctrl_c_ends_a_camera_with_a_playable_file(name, camera, segmenter_bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    camera(lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 12 else None)
    code, out, err = run(capsys, segmenter_bundles["pad"], name, "--save", "out.mp4", "-q")
    first, second, last = out.splitlines()
    assert code == 0 and err == ""
    assert first.startswith("camera:0 (frame 1): ") and second.startswith("camera:0 (frame 11): ")
    assert last.startswith("camera:0: 12 frames in ") and "saved as out.mp4" in last
    drawn = frames_of(Path("out.mp4"))  # 30 frames a second: each is shown for a tenth of a second
    assert len(drawn) == 1 + round(1.1 * 30) and alike(drawn[2], drawn[3])
    assert [each.name for each in tmp_path.iterdir()] == ["out.mp4"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_camera_that_is_unplugged(camera, segmenter_bundles, tmp_path, capsys):
    camera(lambda number: None)
    code, out, err = run(capsys, segmenter_bundles["pad"], "camera:0", "--json", "--save", tmp_path)
    rows = json.loads(out)
    assert code == 2 and "camera:0 gives no more frames, after 15 frames" in err
    assert rows[3]["camera"] == 0 and rows[3]["seconds"] == 0.3 and "error" in rows[15]
    assert len(frames_of(tmp_path / "camera-0.mp4")) == 1 + round(1.4 * 30)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_of_a_file(segmenter_bundles, tmp_path):
    long = film(tmp_path / "long.mp4", 3000, (16, 16))
    code = "import sys; from evm_deploy.cli import run_main; sys.exit(run_main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        str(segmenter_bundles["pad"]),
        str(long),
        "--save",
        str(tmp_path / "out.mp4"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert "interrupted; nothing was left behind" in process.stderr.read()
    assert process.returncode == 130 and [each.name for each in tmp_path.iterdir()] == ["long.mp4"]
