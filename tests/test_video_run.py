"""Videos and cameras in evm-run: lines, JSON and drawn videos of each task, and their ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evm_deploy import cli, load
from evm_deploy._util.packages import install_hint
from evm_deploy.data import video
from evm_deploy.data.video import open_video, opencv
from tests.films import COUNT, FPS, alike, film, frames_of, painted
from tests.toolchains import need


def run(capsys, *args):
    code = cli.run_main([str(each) for each in args])
    said = capsys.readouterr()
    return code, said.out, said.err


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
        # the clock of this module alone: other threads would take ticks of a clock that they share
        monkeypatch.setattr(video, "time", SimpleNamespace(monotonic=lambda: next(clock) / 10))

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
