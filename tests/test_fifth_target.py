"""A target that nobody knows of: it is listed, and everything works with it. Its two halves are in tests/fifth."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evm_deploy import cli
from evm_deploy.bench import worker
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.remote import ssh_host as board_module
from evm_deploy.bench.remote.agent import build_agent
from evm_deploy.bundle.loaded import load
from evm_deploy.commands.doctor import examine
from evm_deploy.devices.profiles import find_profile
from evm_deploy.errors import BundleError, UsageError
from evm_deploy.export import settings as export_settings
from evm_deploy.export import targets
from evm_deploy.runtimes import registry
from evm_deploy.sweep.forms import parse_forms
from evm_deploy.sweep.matrix import Matrix, run_matrix
from tests.fifth.runtime import INFO
from tests.fifth.target import TARGET, FifthBuild
from tests.imports import PACKAGE
from tests.sshd import need_sshd, running_sshd
from tests.test_cross import HOST

QUICK = Settings(threads=1, limit_s=1.0)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Register the target with a line in each list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "RUNTIMES", (*registry.RUNTIMES, INFO))
        patch.setattr(targets, "TARGETS", (*targets.TARGETS, TARGET))
        patch.setattr(export_settings, "KINDS", (*export_settings.KINDS, FifthBuild))
        yield


@pytest.fixture(scope="module")
def bundle(registered, micro, tmp_path_factory) -> Path:
    """By the command, with a flag of the target's own."""
    out = tmp_path_factory.mktemp("fifth")
    flags = ["--target", "5th", "--imgsz", "64", "--batch", "dynamic", "--wheels", "3", "-q", "-o", str(out)]
    assert cli.export_main([str(micro), *flags]) == 0
    return out / "micro_64-fifth-fp32-64x64"


@pytest.fixture(scope="module")
def agent(tmp_path_factory) -> bytes:
    """The agent of a package that has the runtime's file, and its line in the list."""
    package = tmp_path_factory.mktemp("package") / "evm_deploy"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    shutil.copyfile(Path(__file__).parent / "fifth" / "runtime.py", package / "runtimes" / "fifth.py")
    listed = package / "runtimes" / "registry.py"
    source = listed.read_text(encoding="utf-8")
    added = source.replace("RUNTIMES = (", "from evm_deploy.runtimes import fifth\n\nRUNTIMES = (fifth.INFO, ", 1)
    assert added != source
    listed.write_text(added, encoding="utf-8")
    return build_agent(package)


def test_it_is_verified_and_described(bundle):
    with load(bundle) as model:
        manifest = model.manifest
        assert all(check.ok for check in model.selftest())
        assert model.target.label == "Fifth" and model.manifest.batch.max is None
    assert manifest.parity["ok"] and manifest.artifact == "model.fifth" and manifest.details["wheels"] == 3
    assert manifest.plan["settings"] == {"wheels": 3}
    assert "fifth.run('model.fifth')" in (bundle / "README.md").read_text(encoding="utf-8")


def test_a_broken_one_is_rejected(micro, tmp_path, capsys):
    flags = ["--target", "fifth", "--imgsz", "64", "--tol", "1e-12", "-q", "-o", str(tmp_path)]
    assert cli.export_main([str(micro), *flags]) == 4
    assert "micro_64-fifth-fp32-64x64.rejected" in capsys.readouterr().err


def test_its_flags_are_its_own(micro, bundle, tmp_path, capsys):
    flags = ["--target", "onnx", "--wheels", "3", "-o", str(tmp_path)]
    assert cli.export_main([str(micro), *flags]) == 2
    assert "--wheels only works with --target fifth" in capsys.readouterr().err
    (tmp_path / "evm.toml").write_text('target = "fifth"\nwheels = 6\nimgsz = 64\n')
    flags = ["--config", str(tmp_path / "evm.toml"), "-q", "-o", str(tmp_path), "--json"]
    assert cli.export_main([str(micro), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["details"]["wheels"] == 6
    with load(bundle, gear="5") as model:
        assert model._options.settings.gear == "5"
    with pytest.raises(UsageError, match="--gear 9: use 1 to 5"):
        load(bundle, gear="9")
    with pytest.raises(UsageError, match=r"target 'fifth' has no CUDA graphs\n  leave --cuda-graph out"):
        load(bundle, cuda_graph=True)
    assert cli.run_main([str(bundle), "--selftest", "--gear", "2"]) == 0


def test_another_targets_bundle_lacks_its_settings(micro_bundle):
    with pytest.raises(UsageError, match=r"target 'onnx' has no gears\n  leave --gear out"):
        load(micro_bundle.path, gear="5")
    with pytest.raises(UsageError, match="'geer' is unknown"):
        load(micro_bundle.path, geer="5")


def test_it_is_measured_layer_by_layer_and_reported(bundle, tmp_path, capsys):
    record = worker.work(bundle, QUICK.with_own(gear="3"))
    assert record.layers["how"].startswith("the fifth's profiler, minus its own overhead") and record.samples_ms
    assert record.settings["gear"] == "3" and record.bundle["target"] == "fifth"
    assert set(record.runtime["versions"]) == {"onnxruntime"}
    record.write(tmp_path / "record.json")
    assert cli.report_main([str(tmp_path / "record.json")]) == 0
    assert "fifth" in capsys.readouterr().out


def test_the_doctor_and_profiles_know_it(tmp_path):
    found = examine()["targets"]["fifth"]
    assert found["build"] and found["run"] and found["versions"]["onnxruntime"]
    text = f'description = "d"\nplatform = "{HOST}"\nprefer = ["fifth fp32"]\n\n[fifth]\ngear = "4"\n'
    (tmp_path / "d.toml").write_text(text)
    assert find_profile(str(tmp_path / "d.toml")).settings == {"fifth": {"gear": "4"}}
    (tmp_path / "d.toml").write_text(text.replace("gear", "geer"))
    with pytest.raises(UsageError, match=r"d.toml: \[fifth\]: .*'geer' is unknown"):
        find_profile(str(tmp_path / "d.toml"))


@pytest.mark.slow
def test_it_is_a_form_of_a_comparison(micro, tmp_path, monkeypatch):
    monkeypatch.setattr("evm_deploy.sweep.boards.bench", lambda path, settings: worker.work(Path(path), settings))
    matrix = Matrix(micro, parse_forms("fifth,onnx:fp32"), (Settings(1, 1, limit_s=1.0),), tmp_path, "64")
    outcome = run_matrix(matrix)
    assert not outcome.failed
    assert [Record.read(path).bundle["target"] for path in outcome.records] == ["fifth", "onnx"]


@pytest.mark.slow
def test_a_board_measures_it_by_the_agent(agent, bundle, tmp_path):
    (tmp_path / "agent.pyz").write_bytes(agent)
    settings = json.dumps(QUICK.with_own(gear="2").as_dict())
    command = [sys.executable, str(tmp_path / "agent.pyz"), "measure", str(bundle), settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    record = Record.parse(json.loads(done.stdout), "the agent")
    assert record.bundle["target"] == "fifth" and record.settings["gear"] == "2"


def test_a_board_without_it_says_so(bundle, tmp_path):
    (tmp_path / "agent.pyz").write_bytes(build_agent())
    command = [sys.executable, str(tmp_path / "agent.pyz"), "measure", str(bundle), json.dumps(QUICK.as_dict())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = json.loads(done.stdout)["error"]
    assert said["type"] == "BundleError" and "known targets: onnx, openvino, coreml, trt, trt-rtx" in said["text"]


@pytest.mark.slow
def test_a_board_is_asked_for_what_it_needs(agent, bundle, tmp_path, tmp_path_factory, monkeypatch, capsys):
    need_sshd()
    monkeypatch.setattr(board_module, "build_agent", lambda: agent)
    with running_sshd(tmp_path_factory.mktemp("sshd") / "board") as sshd:
        flags = ["--host", "board", "--ssh", sshd.ssh, "--python", sys.executable, "--limit", "1", "-q", "--json"]
        assert cli.bench_main([str(bundle), *flags, "--gear", "2", "-o", str(tmp_path / "out")]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        record = Record.read(Path(row["record"]))
        assert record.device["at"] == "board" and record.settings["gear"] == "2"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
        flags[5] = str(tmp_path / "bare" / "bin" / "python")
        assert cli.bench_main([str(bundle), *flags, "-o", str(tmp_path / "none")]) == 3
    said = capsys.readouterr().err
    assert (
        "lacks packages for target 'fifth': numpy, safetensors, fastjsonschema, onnxruntime" in said
        and "'onnxruntime>=1.17'" in said
    )


@pytest.mark.slow
def test_a_bundle_of_a_later_version_names_what_is_known(bundle, monkeypatch):
    monkeypatch.setattr(registry, "RUNTIMES", registry.RUNTIMES[:-1])
    with pytest.raises(BundleError, match=r"for target 'fifth', .*known targets: onnx, openvino(?s:.*)pip install -U"):
        load(bundle)
