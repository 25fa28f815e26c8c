"""`--adb` on a fake adb and a fake runner: no device was at hand. The fake passes scripts to a real shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from evm_deploy._util.progress import silent
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.remote import perf_test
from evm_deploy.bench.remote.adb_host import AdbHost
from evm_deploy.cli import bench_main
from evm_deploy.errors import ToolchainError, UsageError
from tests.sshd import within

# sh runs Python on the file itself, whose second line is a text for Python: the path of Python may have a space
BY_PYTHON = f"""#!/bin/sh
'''exec' "{sys.executable}" "$0" "$@" # '''
"""
FAKE_ADB = f"""{BY_PYTHON}import os, shutil, subprocess, sys
root, mode = os.environ["FAKE_ROOT"], os.environ.get("FAKE_MODE", "")
serial, what, rest = sys.argv[2], sys.argv[3], sys.argv[4:]
assert sys.argv[1] == "-s"
with open(root + "/calls", "a") as calls:
    print(what, *rest, file=calls)
refusals = {{
    "no device": "error: no devices/emulators found",
    "other": f"adb: device '{{serial}}' not found",
    "unauthorized": "error: device unauthorized.\\nThis adb server's $ADB_VENDOR_KEYS is not set",
    "offline": "error: device offline",
}}
if mode in refusals:
    sys.exit(refusals[mode])
there = lambda text: text.replace("/data/local/tmp", root + "/tmp")
if what == "get-state":
    print("device")
elif what == "shell":
    os.execvp("sh", ["sh", "-c", there(rest[0])])
elif what == mode:
    sys.exit(f"adb: error: {{what}} failed: No space left on device")
elif what == "push":
    for source in rest[:-1]:
        shutil.copy(source, there(rest[-1]))
elif what == "pull":
    shutil.copy(there(rest[0]), rest[1])
"""
FAKE_RUNNER = f"""{BY_PYTHON}import os, sys, time
mode = os.environ.get("FAKE_MODE", "")
open(os.environ["FAKE_ROOT"] + "/arguments", "w").write(" ".join(sys.argv[1:]))
if mode == "crash":
    print("terminating: illegal instruction")
    os.abort()
if mode == "hang":
    time.sleep(60)
assert os.path.exists(sys.argv[-2])
print("\\nSession creation time cost: 0.0508382 s\\nFirst inference time cost: 42 ms")
if mode != "no result":
    with open(sys.argv[-1], "a") as file:
        for run in range(400):
            seconds = 0.030 if run < 3 else 0.010 + 1e-5 * (run % 7)
            file.write(f"tmp,{{seconds:.6g}},109531136,25,{{run}}\\n")
"""
GETPROP = """#!/bin/sh
case $1 in ro.product.model) echo Robot 7;; ro.product.manufacturer) echo Acme;; ro.soc.model) echo SM8650;;
ro.product.cpu.abi) echo arm64-v8a;; ro.build.version.release) echo 15;; esac
"""


@pytest.fixture
def device(tmp_path, monkeypatch) -> Path:
    """Folder of the fake: `tmp` is the device's /data/local/tmp."""
    root = tmp_path / "device"
    (root / "bin").mkdir(parents=True)
    (root / "tmp").mkdir()
    for name, text in (("adb", FAKE_ADB), ("getprop", GETPROP), ("perf test", FAKE_RUNNER)):
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
    (root / "bin" / "libonnxruntime.so").write_text("")
    monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_ROOT", str(root))
    return root


def flags(device: Path, out: Path) -> list[str]:
    return ["--adb", "R5CX", "--runner", str(device / "bin" / "perf test"), "--limit", "3", "-o", str(out)]


def test_a_device_is_measured_and_left_as_it_was(device, micro_bundle, tmp_path, capsys):
    command = [str(micro_bundle.path), *flags(device, tmp_path / "out"), "--device", "android"]
    assert bench_main(command) == 0
    assert not list((device / "tmp").iterdir())
    (file,) = (tmp_path / "out").iterdir()
    record = Record.read(file)
    assert record.summary_ms["p50"] == pytest.approx(10.03) and record.summary_ms["max"] < 11 and record.stable
    assert record.warm_up > 3 and record.load_ms == {"fresh": 50.84} and record.first_ms == 42.0
    assert record.memory_mb == {"peak": 104.5} and record.runtime["scan"]["value"] == "portable"
    found = record.device
    assert (found["at"], found["profile"], found["model"]) == ("adb R5CX", "android", "Acme Robot 7")
    assert (found["cpu"], found["machine"], found["system"]) == ("SM8650", "arm64-v8a", "Android 15")
    assert (device / "arguments").read_text() == "-I -e cpu -m duration -t 3 -x 4 model.onnx result.csv"
    assert "libonnxruntime.so" in (device / "calls").read_text()
    assert "at adb R5CX" in capsys.readouterr().out


@pytest.mark.slow
def test_several_settings_use_results_of_their_own(device, micro_bundle, tmp_path):
    assert bench_main([str(micro_bundle.path), *flags(device, tmp_path / "out"), "--threads", "1,2"]) == 0
    counts = [len(Record.read(file).samples_ms) for file in (tmp_path / "out").iterdir()]
    assert len(counts) == 2 and counts[0] == counts[1] < 400


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("no device", "R5CX cannot be reached: error: no devices/emulators found\n  connect a device"),
        ("other", "adb: device 'R5CX' not found\n  adb devices  lists"),
        ("unauthorized", "error: device unauthorized.\n  allow this computer on the device's screen"),
        ("offline", "error: device offline\n  unplug it"),
        ("push", "adb push on R5CX failed with code 1: adb: error: push failed: No space left"),
        (
            "crash",
            "perf test failed: adb shell on R5CX failed with code 134: terminating: illegal instruction\n  check that",
        ),
        ("pull", "adb pull on R5CX failed with code 1: adb: error: pull failed"),
        ("no result", "adb pull on R5CX failed with code 1"),
    ],
)
def test_failures(device, micro_bundle, tmp_path, capsys, monkeypatch, mode, says):
    monkeypatch.setenv("FAKE_MODE", mode)
    assert bench_main([str(micro_bundle.path), *flags(device, tmp_path / "out")]) == 3
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown
    assert not list((device / "tmp").iterdir()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_an_interrupted_measurement_leaves_nothing(device, micro_bundle, tmp_path, monkeypatch, how):
    monkeypatch.setenv("FAKE_MODE", "hang")
    code = "import sys; from evm_deploy.cli import bench_main; sys.exit(bench_main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(micro_bundle.path), *flags(device, tmp_path / "out"), "-q"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        assert within(20, lambda: runners(device))
        getattr(process, how)()
        assert process.wait(10) == (130 if how == "terminate" else -9)
    assert within(5, lambda: not runners(device) and not list((device / "tmp").iterdir()))


def runners(device: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            if b"./perf test" in words and str(device).encode() in (path.parent / "environ").read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_a_runner_that_does_not_end_is_stopped(device, micro_bundle, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "hang")
    monkeypatch.setattr("evm_deploy.bench.remote.adb_host.ANSWER_S", 1.0)
    settings = Settings(limit_s=0.5)
    with AdbHost("R5CX", device / "bin" / "perf test", silent) as phone:
        phone.prepare(micro_bundle.path, settings)
        with pytest.raises(ToolchainError, match="adb shell on R5CX did not end within 2 s"):
            phone(micro_bundle.path, settings)
    assert within(5, lambda: not runners(device) and not list((device / "tmp").iterdir()))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--end-to-end"], "--end-to-end with --adb"),
        (["--cuda-graph"], "--cuda-graph with --adb"),
        (["--cache", "x"], "--cache with --adb"),
        (["--openvino-device", "GPU"], "--openvino-device GPU with --adb"),
        (["--scan", "plugin"], "no native library for Android; it has libraries for: none"),
        (["--batch", "3"], "exported with --batch 1"),
        (["--device", "pi5"], "device 'pi5' has platform linux-aarch64, but the host has android-aarch64"),
    ],
)
def test_what_cannot_be_measured_there(device, micro_bundle, tmp_path, capsys, extra, says):
    assert bench_main([str(micro_bundle.path), *flags(device, tmp_path / "out"), *extra]) == 2
    assert says in capsys.readouterr().err and not list((device / "tmp").iterdir())


@pytest.mark.slow
def test_other_targets_are_refused(device, coreml_bundle):
    with (
        AdbHost("R5CX", device / "bin" / "perf test", silent) as phone,
        pytest.raises(UsageError, match="a bundle for coreml with --adb"),
    ):
        phone.prepare(coreml_bundle.path, Settings())


def test_a_library_for_android_is_used_where_a_bundle_has_one(device):
    runner, library = device / "bin" / "perf test", "plugins/android-aarch64/evm.so"
    manifest = SimpleNamespace(plugins={"android-aarch64": library})
    unsigned, signed = AdbHost("R5CX", runner, silent), AdbHost("R5CX", runner, silent, key=object())
    assert unsigned._library(manifest, Settings(scan="bundled")) == library
    assert signed._library(manifest, Settings()) == library
    assert unsigned._library(manifest, Settings()) is None  # a library is a program: nobody vouched for it
    assert signed._library(manifest, Settings(scan="portable")) is None
    with pytest.raises(UsageError, match="use --scan bundled"):
        signed._library(manifest, Settings(scan="plugin"))
    arguments = " ".join(perf_test.arguments("m", 1, None, 4, "./evm.so"))
    assert arguments == "-I -e cpu -m duration -t 1 -x 0 -f batch:4 -R ./evm.so m result.csv"


@pytest.mark.parametrize("name", ["libc++_shared.so", "-e", "perf test", "libonnxruntime.so", "a b; touch x"])
def test_names_of_a_bundle_are_not_names_on_the_device(name, device, micro_bundle, tmp_path):
    """LD_LIBRARY_PATH is the folder there: a model of such a name would be loaded as that library."""
    bundle = shutil.copytree(micro_bundle.path, tmp_path / "-bundle")
    (bundle / "model.onnx").rename(bundle / name)
    content = json.loads((bundle / "manifest.json").read_text())
    content["files"][name] = content["files"].pop("model.onnx")
    (bundle / "manifest.json").write_text(json.dumps({**content, "artifact": name}))
    with AdbHost("R5CX", device / "bin" / "perf test", silent) as phone:
        phone.prepare(bundle, Settings())
        (folder,) = (device / "tmp").iterdir()
        assert {file.name for file in folder.iterdir()} == {"model.onnx", "perf test", "libonnxruntime.so"}
        assert (folder / "libonnxruntime.so").read_bytes() == b"" and b"python" in (folder / "perf test").read_bytes()
        assert phone(bundle, Settings(limit_s=1.0)).samples_ms


def test_without_adb(device, micro_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench_main([str(micro_bundle.path), *flags(device, tmp_path / "out")]) == 3
    assert "adb is not installed\n  install Android's platform-tools" in capsys.readouterr().err
    with pytest.raises(UsageError, match="is not a file"):
        AdbHost("R5CX", tmp_path / "nothing", silent)


# ------------------------------------------------------------------------------------------------------ its results

PRINTED = "Session creation time cost: 0.05 s\nFirst inference time cost: 3 ms\n"


@pytest.mark.parametrize(
    ("printed", "written"),
    [
        ("", "m,0.01,1,1,0\n"),
        (PRINTED, ""),
        (PRINTED, "m,0.01,1,1\n"),
        (PRINTED, "m,fast,1,1,0\n"),
        (PRINTED, "m,0,1,1,0\n"),
        (PRINTED, "m,-1,1,1,0\n"),
        (PRINTED, "m,nan,1,1,0\n"),
    ],
)
def test_what_is_no_result(printed, written):
    with pytest.raises(ToolchainError, match="not that of onnxruntime_perf_test"):
        perf_test.read(printed, written)


def test_one_run_is_a_result_and_not_stable():
    found = perf_test.read(PRINTED, "m,0.5,1048576,99,0\n")
    assert found.latency.samples == (500.0,) and not found.latency.stable
    assert (found.load_ms, found.first_ms, found.peak_mb) == (50.0, 3.0, 1.0)


def test_stable_is_what_ends_so():
    steady = perf_test.settled([10.0] * 200)
    assert steady.stable and len(steady.samples) == 160  # a fifth is warm-up: 400 of 2000 ms
    assert not perf_test.settled([10.0 * 1.003**i for i in range(200)]).stable
    assert perf_test.settled([30.0] * 60 + [10.0] * 200).stable
    assert not perf_test.settled([10.0] * 60).stable  # two windows
