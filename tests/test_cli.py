"""The commands as a user meets them: streams, exit codes, messages."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from evm_deploy import cli
from evm_deploy._util.packages import install_hint
from evm_deploy.commands.bench import bench_parser
from evm_deploy.commands.export_flags import export_parser
from evm_deploy.errors import UsageError
from evm_deploy.export.onnx import TARGET
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import check_plan
from tests.costs import cpu_seconds

HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "tensorrt", "coremltools"}
EXPORT = "from evm_deploy.cli import export_main; raise SystemExit(export_main())"


def run_export(*flags):
    return cli.export_main([str(flag) for flag in flags])


@pytest.mark.parametrize(
    "module", ["evm_deploy", "evm_deploy.commands.export", "evm_deploy.bundle.loaded", "evm_deploy.export.targets"]
)
def test_import_loads_no_engine(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_running_a_bundle_never_loads_torch(micro_bundle):
    code = f"import sys, evm_deploy; m = evm_deploy.load({str(micro_bundle.path)!r}); m.selftest(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in loaded and "onnx" not in loaded


def test_help_is_quick_and_lists_exit_codes():
    shown, seconds = _timed(EXPORT, "--help")
    assert "exit codes" in shown and "--imgsz" in shown
    assert seconds < _quick()


@functools.cache
def _quick():
    """Return a quarter of the CPU seconds that it takes to import torch, which no help needs."""
    return _timed("import torch", tries=1)[1] / 4


def _timed(code, *flags, tries=5):
    """Return Python's output and its CPU seconds, the least of several tries, because the machine may be busy."""
    spent = []
    for _ in range(tries):
        start = cpu_seconds()
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
        spent.append(cpu_seconds() - start)
    return done.stdout, min(spent)


def test_slow_imports_are_noticed():
    """The negative control of the time."""
    assert _timed(f"import torch; {EXPORT}", "--help", tries=1)[1] > _quick()


BAD_FLAGS = {
    "no target": ([], "--target is missing"),
    "misspelt target": (["--target", "onxx"], "did you mean onnx?"),
    "unknown target": (["--target", "onnx,toaster"], "choose from: onnx"),
    "int8 without images": (["--target", "onnx", "--int8"], "add --calib DIR"),
    "images without int8": (
        ["--target", "onnx", "--calib", "demo"],
        "--calib is for int8 and w8, this export is float",
    ),
    "max drop": (["--target", "onnx", "--int8", "--calib", "demo", "--max-drop", "1"], "add --val DIR"),
    "misspelt precision": (["--target", "onnx", "--precision", "fp23"], "did you mean fp32?"),
    "scan": (["--target", "onnx", "--scan", "plugin"], "has no scan lowering 'plugin'; it has: auto, portable"),
    "small": (["--target", "onnx", "--imgsz", "3"], "too small: at least 4 pixels"),
    "imgsz": (["--target", "onnx", "--imgsz", "224x"], "use 224, or HxW"),
    "huge": (["--target", "onnx", "--imgsz", "99999"], "at most 8192"),
    "batch": (["--target", "onnx", "--batch", "0"], "use a number from 1"),
    "batch order": (["--target", "onnx", "--batch", "4:2:8"], "min:opt:max"),
    "minimum system": (["--target", "onnx", "--min-target", "iOS17"], "has no minimum system 'iOS17'; it has: none"),
    "opset": (["--target", "onnx", "--opset", "9"], "supported are 18 to 23"),
    "opset text": (["--target", "onnx", "--opset", "new"], "not a whole number"),
    "tol": (["--target", "onnx", "--tol", "-1"], "between 0 and 1"),
    "head": (["--target", "onnx", "--head", "logit"], "did you mean logits?"),
    "mean": (
        ["--target", "onnx", "--mean", "0.5"],
        "--mean has 1 value, the network has 3 input channels\n  give 3 numbers, such as 0.5,0.5,0.5",
    ),
    "std": (["--target", "onnx", "--std", "0,1,1"], "it must be positive"),
    "crop": (["--target", "onnx", "--crop-pct", "2"], "at most 1"),
    "interpolation": (["--target", "onnx", "--interpolation", "cubic"], "choose from: bicubic, bilinear"),
    "labels": (["--target", "onnx", "--labels", "no.txt"], "cannot be read"),
    "config": (["--target", "onnx", "--config", "no.toml"], "No such file"),
    "two precisions": (["--target", "onnx", "--fp16", "--precision", "fp32"], "not allowed with"),
    "flag": (["--target", "onnx", "--fast"], "unrecognized arguments"),
    "misspelt flag": (["--target", "onnx", "--imgsize=64"], "did you mean --imgsz?"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_exit_2_with_one_message(name, micro, tmp_path, capsys):
    flags, message = BAD_FLAGS[name]
    try:
        code = run_export(micro, "-o", tmp_path / "out", *flags)
    except SystemExit as error:  # argparse's own
        code = error.code
    streams = capsys.readouterr()
    assert code == 2
    assert message in streams.err and "Traceback" not in streams.err
    assert streams.out == "" and not (tmp_path / "out").exists()


def test_a_precision_that_the_target_lacks():
    with pytest.raises(UsageError, match="target 'onnx' has no precision 'w8'; it has: fp32, fp16"):
        runtime = replace(TARGET.runtime, precisions=("fp32", "fp16"))
        check_plan(replace(TARGET, runtime=runtime), ExportPlan("onnx", precision="w8"))


def test_labels_must_fit_the_head(micro, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    assert run_export(micro, "--target", "onnx", "--labels", tmp_path / "labels.txt", "-o", tmp_path / "o") == 2
    assert "2 labels for a head of 10 classes" in capsys.readouterr().err


def test_a_missing_checkpoint(tmp_path, capsys):
    assert run_export(tmp_path / "no.pth", "--target", "onnx", "-o", tmp_path / "out") == 2
    assert "no.pth does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(micro, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_export(micro, "--target", "ort", "--imgsz", "64x96", "--dry-run", "-o", out) == 0
    assert "micro_64-onnx-fp32-64x96" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.slow
def test_json_is_one_object_on_stdout(micro, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("\n".join(f"digit {i}" for i in range(10)))
    flags = ["--target", "onnx", "--imgsz", 32, "--json", "--labels", tmp_path / "labels.txt", "-o", tmp_path]
    assert run_export(micro, *flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["manifest"]["parity"]["ok"] is True
    assert cli.run_main([result["bundle"], "--selftest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_config_file_and_command_line(micro, tmp_path, capsys):
    config = tmp_path / "evm.toml"
    config.write_text(
        'target = "onnx"\nimgsz = 96\nfp16 = true\nmean = [0.5, 0.5, 0.5]\ncrop_pct = 1.0\ndry-run = true\n'
    )
    assert run_export(micro, "--config", config, "--imgsz", 32, "--json", "-o", tmp_path / "out") == 0
    facts = json.loads(capsys.readouterr().out)
    assert "fp16, 32x32" in facts["Would"] and facts["Input"] == "image, 3 channels, resize crop 1.0, bicubic"
    config.write_text("imgzs = 96\n")
    assert run_export(micro, "--config", config, "--target", "onnx") == 2
    assert "did you mean imgsz?" in capsys.readouterr().err
    config.write_text("imgsz = ")
    assert run_export(micro, "--config", config, "--target", "onnx") == 2
    assert "is not TOML" in capsys.readouterr().err


def test_the_demo_is_used_and_said(tmp_path, capsys):
    assert run_export("--target", "onnx", "--dry-run", "-o", tmp_path) == 0
    streams = capsys.readouterr()
    assert "embedded demo" in streams.err and "10 classes" in streams.out


@pytest.mark.parametrize("flags", [[], ["--top", "0", "a.png"], ["--threads", "0", "--selftest"]])
def test_bad_run_flags(flags, micro_bundle, capsys):
    assert cli.run_main([str(micro_bundle.path), *flags]) == 2
    assert "evm-run: " in capsys.readouterr().err


def test_a_missing_package_exits_3_and_says_what_to_install(micro, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evm_deploy._util.packages.find_spec", lambda name: None if name == "onnxsim" else object())
    assert run_export(micro, "--target", "onnx", "-o", tmp_path / "out") == 3
    assert install_hint("onnx") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parser", "titles"),
    [
        (
            export_parser,
            "input and model, target and precision, calibration and accuracy, graph, preprocessing, device and engine, "
            "output",
        ),
        (bench_parser, "what to measure, where to measure, output"),
    ],
)
def test_every_flag_is_in_a_group_of_the_help(parser, titles):
    shown = parser().format_help()
    assert all(f"\n{title}:\n" in shown for title in titles.split(", "))
    assert re.search(r"^options:\n  -h, --help .*\n\n", shown, re.M), "only --help has no group"


@pytest.mark.parametrize("main", [cli.export_main, cli.run_main, cli.bench_main, cli.report_main, cli.doctor_main])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--version", 0), ("--no-such-flag", 2)])
def test_every_command_answers_what_a_newcomer_types(main, flag, code, capsys):
    """A percent sign in a help text or metavar makes argparse raise, only when the help is printed."""
    with pytest.raises(SystemExit) as ended:
        main([flag])
    out, err = capsys.readouterr()
    assert ended.value.code == code and (err if code else out).strip()
