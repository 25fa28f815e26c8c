"""Several targets in a command: a single trace, and a failure that hides no other result."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evm_deploy import cli
from evm_deploy.errors import UsageError
from evm_deploy.export import ExportPlan, export, many
from evm_deploy.export.source import Source
from evm_deploy.export.target import Environment, Target
from evm_deploy.export.targets import load_targets, resolve_names
from evm_deploy.runtimes.base import Batch
from tests import cache


@pytest.fixture
def traces(monkeypatch):
    """The traces of the hub graph, whether or not the tests' cache serves them."""
    original, seen = cache.GRAPHS.trace, []
    monkeypatch.setattr(cache.GRAPHS, "trace", lambda *arguments: seen.append(arguments) or original(*arguments))
    return seen


@pytest.fixture
def one_core(monkeypatch):
    """All exports in this process, where tests can see and patch them."""
    monkeypatch.setattr(many, "usable_cores", lambda: 1)


def flags(checkpoint, targets, out, *more):
    return [str(checkpoint), "--target", targets, "--imgsz", "64", "-q", "-o", str(out), *more]


def test_a_target_that_fails_is_reported_and_the_others_are_exported(one_core, micro, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evm_deploy._util.packages.find_spec", lambda name: None if name == "coremltools" else object())
    assert cli.export_main(flags(micro, "coreml,onnx,trt", tmp_path, "--json")) == 3
    out, err = capsys.readouterr()
    failed, onnx, trt = json.loads(out)
    assert failed["target"] == "coreml" and failed["exit_code"] == 3 and "packages are missing" in failed["error"]
    assert [entry["manifest"]["target"] for entry in (onnx, trt)] == ["onnx", "trt"]
    assert "evm-export: coreml: target 'coreml' cannot be built here" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["micro_64-onnx-fp32-64x64", "micro_64-trt-fp32-64x64"]


def test_the_largest_exit_code_is_returned(one_core, micro, tmp_path, monkeypatch, capsys):
    """Parity fails for two of three targets: 4, and both rejected artifacts are named."""
    monkeypatch.setattr("evm_deploy._util.packages.find_spec", lambda name: None if name == "coremltools" else object())
    assert cli.export_main(flags(micro, "onnx,coreml,trt", tmp_path, "--tol", "1e-12")) == 4
    err = capsys.readouterr().err
    assert err.count("the artifact differs from the float model") == 2 and err.count(".rejected") == 2


def test_plans_that_no_target_can_do_stop_the_command_before_any_export(micro, tmp_path, capsys):
    assert cli.export_main(flags(micro, "onnx,coreml", tmp_path, "--precision", "int8-fp16")) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_targets_of_one_command_share_a_trace(traces, micro, tmp_path):
    assert cli.export_main(flags(micro, "onnx,openvino,trt", tmp_path)) == 0
    assert len(traces) == 1 and len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_a_source_traces_again_only_for_what_differs(traces, micro, tmp_path):
    source = Source(micro)
    first = export(source, ExportPlan("onnx", imgsz=(64, 64)), tmp_path / "a")
    export(source, ExportPlan("onnx", "fp16", imgsz=(64, 64)), tmp_path / "b")
    export(source, ExportPlan("onnx", "w8", imgsz=(64, 64)), tmp_path / "c")
    assert len(traces) == 1
    export(source, ExportPlan("onnx", imgsz=(64, 64), head="probs"), tmp_path / "d")
    export(source, ExportPlan("onnx", imgsz=(64, 64), mean=(0.5, 0.5, 0.5)), tmp_path / "e")
    export(source, ExportPlan("onnx", imgsz=(32, 64)), tmp_path / "f")
    assert len(traces) == 4
    again = export(source, ExportPlan("onnx", imgsz=(64, 64)), tmp_path / "g")
    alone = export(micro, ExportPlan("onnx", imgsz=(64, 64)), tmp_path / "h")
    files = [(bundle.path / "model.onnx").read_bytes() for bundle in (first, again, alone)]
    assert files[0] == files[1] == files[2]  # what one export does to the shared graph, no other sees


@pytest.mark.slow
def test_another_kind_of_trace_runs_in_a_process_of_its_own(micro, tmp_path):
    """Bundle, failures and steps of the other process arrive here, in the order of the plans."""
    entered = []

    @contextlib.contextmanager
    def step(name, detail):
        entered.append((name, detail))
        yield lambda done, total: None

    plans = [ExportPlan(target, imgsz=(64, 64)) for target in ("coreml", "onnx")]
    plans.insert(1, ExportPlan("coreml", imgsz=(64, 64), batch=Batch(2, 2, 2)))
    found = {each.plan: each for each in many.export_all(micro, plans[::-1], tmp_path, step=step, cores=2)}
    assert found[plans[0]].bundle.manifest.target == "coreml" and found[plans[2]].bundle.manifest.target == "onnx"
    assert isinstance(found[plans[1]].error, UsageError) and "an image input of Core ML takes one" in str(
        found[plans[1]].error
    )
    assert ("verify", "coreml: 3 images, 2 scans, portable") in entered


def test_a_process_that_dies_is_an_error_of_its_plans(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    plans = [ExportPlan(target, imgsz=(64, 64)) for target in ("onnx", "coreml")]
    first, second = many.export_all(micro, plans, tmp_path, cores=2)
    assert first.bundle and "ended with exit code 1" in str(second.error) and second.error.exit_code == 3


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_the_process_ends_with_the_command(signum, micro, tmp_path):
    """However the command ends; and what it had begun is removed."""
    code = "from evm_deploy.cli import export_main; raise SystemExit(export_main())"
    command = [sys.executable, "-c", code, *flags(micro, "onnx,coreml", tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait(lambda: list(tmp_path.glob(".*coreml*")))
        children = children_of(process.pid)
        process.send_signal(signum)
    assert children
    wait(lambda: not any(map(alive, children)))
    assert not list(tmp_path.glob(".*coreml*"))


def wait(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children_of(pid):
    """Processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if entry.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(entry.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_is_every_target_that_can_be_built_and_the_others_are_named(monkeypatch, tmp_path, capsys):
    cannot = Environment(False, {}, "pip install nothing")
    monkeypatch.setattr(Target, "environment", lambda self: cannot if self.name == "coreml" else Environment(True, {}))
    assert "coreml" not in resolve_names("all") and resolve_names("coreml") == ["coreml"]
    assert resolve_names("all") == [name for name in load_targets() if name != "coreml"]
    assert cli.export_main(["--target", "all", "-o", str(tmp_path), "--dry-run", "--json"]) == 0
    assert (
        "--target all leaves out coreml, whose packages are missing\n  pip install nothing" in capsys.readouterr().err
    )


def test_all_without_any_target_that_can_be_built_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Target, "environment", lambda self: Environment(False, {}, "pip install nothing"))
    assert cli.export_main(["--target", "all", "-o", str(tmp_path / "out")]) == 3
    assert "no target can be built here, packages are missing\n  pip install nothing" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))
