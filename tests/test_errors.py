"""Every error says what is wrong, where, and what to do next; no traceback reaches a user who did not ask with -v."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from evm_deploy import cli, errors
from evm_deploy._util.packages import install_hint
from evm_deploy.calib import evaluate
from evm_deploy.errors import BundleError
from tests.records import record, written

PACKAGE = Path(errors.__file__).parent
CLASSES = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}


@dataclass(frozen=True)
class Scene:
    """How a user meets an error: `run(scene's tools)` -> exit code; what it must say, and where."""

    run: Callable[[Tools], int]
    says: tuple[str, ...]


@dataclass
class Tools:
    folder: Path
    micro: Path
    bundle: Path
    monkeypatch: pytest.MonkeyPatch

    def export(self, *flags: object) -> int:
        return cli.export_main(
            [str(self.micro), "--imgsz", "64", "-q", "-o", str(self.folder / "out"), *map(str, flags)]
        )


def without_runtime(tools: Tools) -> int:
    tools.monkeypatch.setitem(sys.modules, "onnxruntime", None)
    return cli.run_main([str(tools.bundle), "--selftest"])


def too_few_images(tools: Tools) -> int:
    (tools.folder / "calib").mkdir()
    return tools.export("--target", "onnx", "--int8", "--calib", tools.folder / "calib")


def inaccurate(tools: Tools) -> int:
    tools.monkeypatch.setattr(evaluate, "MIN_SQNR_DB", 200.0)
    return tools.export("--target", "onnx", "--precision", "w8", "--calib", "demo", "--calib-images", 100)


def slow(tools: Tools) -> int:
    return cli.report_main([str(written(tools.folder / "records", record())), "--max-latency", "0.01ms"])


SCENES = {
    "UsageError": Scene(lambda tools: tools.export("--target", "caffe"), ("caffe", "choose from", "onnx")),
    "CheckpointError": Scene(
        lambda tools: cli.export_main([str(tools.folder / "net.ckpt"), "--target", "onnx", "-q"]),
        ("net.ckpt", "does not exist"),
    ),
    "ImageError": Scene(
        lambda tools: cli.run_main([str(tools.bundle), str(tools.folder / "cat.jpg")]),
        ("cat.jpg", "does not exist"),
    ),
    "CalibrationError": Scene(too_few_images, ("calib", "no images found", "known suffixes: .")),
    "BundleError": Scene(
        lambda tools: cli.run_main([str(tools.folder / "none"), "--selftest"]),
        ("none", "does not exist", "make one with evm-export"),
    ),
    "ToolchainError": Scene(without_runtime, ("onnxruntime is not installed", install_hint("run-onnx"))),
    "ParityError": Scene(
        lambda tools: tools.export("--target", "onnx", "--tol", "1e-12"),
        ("logits differ by", "limit", "kept for inspection", ".rejected"),
    ),
    "AccuracyError": Scene(inaccurate, ("w8 is not accurate enough", "kept for inspection", ".rejected")),
    "LatencyError": Scene(slow, ("ms", "limit: 0.01 ms", "checked")),
}


def test_every_class_has_a_scene():
    assert set(SCENES) == set(CLASSES) - {"EvmError"}


@pytest.mark.parametrize("name", SCENES)
def test_what_a_user_sees(name, micro, micro_bundle, tmp_path, capsys, monkeypatch):
    scene = SCENES[name]
    code = scene.run(Tools(tmp_path, micro, micro_bundle.path, monkeypatch))
    said = capsys.readouterr().err
    assert code == CLASSES[name].exit_code
    assert all(part in said for part in scene.says), said
    assert said.startswith("evm-") and "Traceback" not in said and "internal error" not in said
    assert len(said.strip().splitlines()) <= 4


def test_v_shows_where_it_came_from(tmp_path, capsys):
    assert cli.run_main([str(tmp_path / "none"), "--selftest", "-v"]) == BundleError.exit_code
    said = capsys.readouterr().err
    assert "make one with evm-export" in said and "Traceback" in said and "in open_bundle" in said


def test_what_nobody_foresaw_has_no_traceback_either(micro_bundle, monkeypatch, capsys, tmp_path):
    from evm_deploy.bundle.loaded import LoadedBundle

    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(LoadedBundle, "predict", bug)
    Image.new("RGB", (70, 70)).save(tmp_path / "a.png")
    assert cli.run_main([str(micro_bundle.path), str(tmp_path / "a.png")]) == 1
    said = capsys.readouterr().err
    assert (
        "internal error: ZeroDivisionError: a bug" in said and "run again with -v" in said and "Traceback" not in said
    )


def calls() -> list[tuple[str, ast.Call]]:
    """Every place that makes an EvmError."""
    return [
        (f"{path.relative_to(PACKAGE)}:{node.lineno}", node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES
    ]


def test_every_message_names_something_or_says_what_next():
    """A message of fixed words alone cannot say where; then it must at least say what to do."""
    found = calls()
    assert len(found) > 250
    for place, call in found:
        assert call.args, f"{place}: no message"
        message, fixed = call.args[0], isinstance(call.args[0], ast.Constant)
        flag = fixed and "--" in str(message.value)
        assert not fixed or flag or len(call.args) > 1 or call.keywords, f"{place}: {message.value!r} has no hint"
        last = message.values[-1] if isinstance(message, ast.JoinedStr) else message
        assert not (isinstance(last, ast.Constant) and str(last.value).endswith(".")), f"{place}: ends with a full stop"
