"""The first things that people type: commands without arguments, the demo's int8, dry runs, lines to paste."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evm_deploy import cli
from evm_deploy._util.toml import read_toml
from evm_deploy.bench.record import Record
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.commands.summary import export_summary
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import EvmError
from tests.records import record


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("main", "args", "says"),
    [
        (cli.export_main, [], "evm-export --target onnx exports the embedded demo"),
        (cli.export_main, ["my net.ckpt"], "evm-export 'my net.ckpt' --target onnx"),
        (cli.run_main, [], "evm-run BUNDLE cat.jpg"),
        (cli.run_main, ["my bundle"], "evm-run 'my bundle' --selftest"),
    ],
)
def test_a_command_without_arguments_says_what_to_type(here, capsys, main, args, says):
    assert main(args) == 2
    told = capsys.readouterr()
    assert says in told.err and told.out == ""


@pytest.mark.parametrize("checkpoint", [[], [str(CHECKPOINT)]], ids=["default", "by path"])
@pytest.mark.parametrize("target", ["trt", "onnx", "trt,onnx"])
@pytest.mark.parametrize("precision", [["--int8"], ["--precision", "int8"]], ids=" ".join)
def test_int8_of_the_demo_is_calibrated_on_its_own_images_and_says_so(here, capsys, checkpoint, target, precision):
    assert cli.export_main([*checkpoint, "--target", target, *precision, "--dry-run", "-q"]) == 0
    told = capsys.readouterr()
    assert told.err.count("int8 is calibrated on the demo's own images") == 1
    assert "448 images of demo" in told.out


@pytest.mark.parametrize("flags", [[], ["--fp16"], ["--precision", "w8", "--val", "demo"]], ids=" ".join)
def test_nothing_else_takes_the_images_of_the_demo(here, capsys, flags):
    assert cli.export_main(["--target", "onnx", *flags, "--dry-run", "-q"]) == 0
    assert "calibrated on" not in capsys.readouterr().err


def test_other_checkpoints_are_told_what_int8_needs(here, capsys):
    shutil.copy(CHECKPOINT, "mine.safetensors")
    assert cli.export_main(["mine.safetensors", "--target", "trt", "--int8"]) == 2
    assert "int8 needs images to calibrate with\n  add --calib DIR" in capsys.readouterr().err


def few(folder: Path) -> str:
    np.savez(folder / "few.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, 1, 99]))
    return str(folder / "few.npz")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--int8", "--calib", "nowhere"], "nowhere does not exist"),
        (["--int8", "--calib", few], "images are too few"),
        (["--int8", "--calib", "demo", "--val", "nowhere"], "nowhere does not exist"),
        (["--precision", "w8", "--calib", "nowhere"], "nowhere does not exist"),
        (["--precision", "w8", "--val", "nowhere"], "nowhere does not exist"),
        (["--precision", "w8", "--val", few], "label 99"),
        (["--mean", "123,116,103"], "divide them by 255"),
        (["--std", "58.395,57.12,57.375"], "divide them by 255"),
        (["--crop-pct", "0.005"], "from 0.1 to 1"),
    ],
    ids=lambda value: (
        " ".join(getattr(each, "__name__", each) for each in value)[:40] if isinstance(value, list) else ""
    ),
)
def test_a_dry_run_refuses_what_the_export_refuses(here, capsys, flags, says):
    flags = [flag(here) if callable(flag) else flag for flag in flags]
    for more in (["--dry-run"], []):
        assert cli.export_main(["--target", "onnx", *flags, *more, "-q"]) == 2
        assert says in capsys.readouterr().err
    assert not Path("dist").exists() or not list(Path("dist").iterdir())


def test_assumptions_are_shown_by_a_dry_run_and_stored_in_the_manifest(here, capsys):
    save_file(load_file(CHECKPOINT), "bare.safetensors")  # without what the demo says of itself
    assert cli.export_main(["bare.safetensors", "--target", "onnx", "--imgsz", "64", "--dry-run"]) == 0
    assumed = "assumed, because neither the checkpoint nor a flag says: mean 0.485,0.456,0.406"
    assert assumed in capsys.readouterr().out
    assert cli.export_main(["bare.safetensors", "--target", "onnx", "--imgsz", "64", "-q"]) == 0
    assert f"Note      {assumed}" in capsys.readouterr().out
    assert cli.export_main(["--target", "onnx", "--imgsz", "64", "--dry-run"]) == 0
    assert "assumed" not in capsys.readouterr().out
    (manifest,) = here.glob("dist/*/manifest.json")
    assert any(note.startswith(assumed) for note in json.loads(manifest.read_bytes())["notes"])


@pytest.mark.parametrize("name", ["a b", "a'b", "a (best) [v1]", "$HOME", "a;b", "a&b", "модель", "-o"])
def test_lines_to_paste_are_quoted_for_a_shell(demo_bundle, tmp_path, name):
    bundle = Bundle(shutil.copytree(demo_bundle.path, tmp_path / "out [1]" / name), demo_bundle.manifest)
    lines = [line for line in export_summary(bundle, 1).splitlines() if "evm-run" in line]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line[line.index("evm-run") :])
        assert words[1] == str(bundle.path)


MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_part_of_a_file(here):
    """Notepad and PowerShell write it in front of UTF-8."""
    Path("c.toml").write_bytes(MARK + b'target = "onnx"\r\n')
    assert cli.export_main(["--config", "c.toml", "--dry-run"]) == 0
    Path("device.toml").write_bytes(MARK + Path(read_of("pi5.toml")).read_bytes())
    assert cli.export_main(["--device", "device.toml", "--dry-run"]) == 0
    Path("labels.txt").write_bytes(MARK + "\n".join(map(str, range(10))).encode())
    assert cli.export_main(["--target", "onnx", "--labels", "labels.txt", "--dry-run"]) == 0
    record().write(Path("plain.json"))
    Path("record.json").write_bytes(MARK + Path("plain.json").read_bytes())
    assert Record.read(Path("record.json")) == Record.read(Path("plain.json"))
    Path("not.toml").write_bytes(b"\xff\xfe" + 'target = "onnx"'.encode("utf-16-le"))
    with pytest.raises(EvmError, match="not TOML"):
        read_toml(Path("not.toml"), "--config")


def read_of(name: str) -> str:
    import evm_deploy.devices

    return str(Path(evm_deploy.devices.__file__).parent / name)


def test_progress_and_results_name_targets_as_people_write_them(here, capsys):
    for target, label in (("openvino", "OpenVINO"), ("trt", "TensorRT"), ("coreml", "Core ML")):
        assert cli.export_main(["--target", target, "--dry-run"]) == 0
        assert f"-> {label} fp" in capsys.readouterr().out
