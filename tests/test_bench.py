"""evm-bench: stable until it is, records that say what was measured, clear errors."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evm_deploy._util.schema import strict_json
from evm_deploy.bench import device, energy, worker
from evm_deploy.bench.latency import Latency, differ, measure, median_interval, throughput
from evm_deploy.bench.measurable import require_runnable
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.run import bench
from evm_deploy.bench.text import layer_lines, lines, record_path
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.calib.evaluate import Accuracy
from evm_deploy.cli import bench_main, doctor_main, export_main, report_main, run_main
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.export.targets import load_targets
from evm_deploy.runtimes.info import Availability
from tests.imports import PACKAGE
from tests.records import JUDGED, LAYERS
from tests.records import record as make_record

QUICK = Settings(threads=1, limit_s=3.0)


class Clock:
    """A clock that runs only when something is `run`: `cost(n)` seconds for the n-th time."""

    def __init__(self, cost: Callable[[int], float]) -> None:
        self.now, self.runs, self.cost = 0.0, 0, cost

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self.cost(self.runs)
        self.runs += 1


def latency(samples) -> Latency:
    return Latency(tuple(samples), 3, True)


def noisy(seed: int, median: float = 10.0, runs: int = 150) -> Latency:
    """Simulate a machine: each run depends on the one before, and one in twenty is interrupted."""
    rng = np.random.default_rng(seed)
    drift = np.zeros(runs)
    for i in range(1, runs):
        drift[i] = 0.7 * drift[i - 1] + rng.normal(0, 0.01)
    return latency(median * np.exp(drift) * np.where(rng.random(runs) < 0.05, 1.5, 1))


def test_a_steady_function_is_measured_in_three_windows():
    clock = Clock(lambda n: 0.010)
    found = measure(clock.run, clock=clock)
    assert found.stable and len(found.samples) == 75 and found.warm_up == 50
    assert found.median == pytest.approx(10.0) and found.summary()["p99"] == pytest.approx(10.0)


def test_the_slow_start_is_no_part_of_it():
    clock = Clock(lambda n: 0.2 if n < 3 else 0.010)
    assert max(measure(clock.run, clock=clock).samples) == pytest.approx(10.0)


def test_streams_run_at_the_same_time():
    """Four at once, as each sees, give four times the images."""
    lock, inside, most = threading.Lock(), [0], [0]

    def run() -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.005)
        with lock:
            inside[0] -= 1

    found = measure(run, streams=4, limit_s=2.0)
    assert most == [4]
    assert len(found.samples) >= 4 and found.warm_up >= 12
    alone = throughput(Latency(found.samples, 0, True), 1)
    assert throughput(found, 1) > 2.5 * alone


def test_an_error_in_a_stream_is_not_lost():
    def fail() -> None:
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        measure(fail, streams=2)


def test_a_drifting_function_is_measured_until_it_is_steady():
    clock = Clock(lambda n: 0.010 * (2.0 - min(n, 400) / 400))
    found = measure(clock.run, clock=clock)
    assert found.stable and len(found.samples) > 300


def test_what_never_gets_steady_ends_and_says_so():
    clock = Clock(lambda n: 0.010 * 1.01**n)
    found = measure(clock.run, limit_s=10.0, clock=clock)
    assert not found.stable and 10.0 <= clock.now < 13.0


def test_a_function_slower_than_the_limit_is_measured_once():
    clock = Clock(lambda n: 30.0)
    found = measure(clock.run, limit_s=20.0, clock=clock)
    assert found.samples == (30000.0,) and not found.stable and found.warm_up == 3


def test_the_interval_holds_the_median_it_is_of():
    """95 % intervals of 200 measurements of the same machine."""
    held = 0
    for seed in range(200):
        low, high = noisy(seed).interval()
        held += low <= 10.0 <= high
    assert held >= 180


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=80))
def test_the_interval_lies_within_the_samples(samples):
    low, high = median_interval(samples)
    assert min(samples) <= low <= high <= max(samples)


@pytest.mark.slow
def test_noise_alone_is_no_difference_and_ten_per_cent_are():
    false_alarms = sum(differ(noisy(2 * seed), noisy(2 * seed + 1)) for seed in range(100))
    found = sum(differ(noisy(2 * seed), noisy(2 * seed + 1, median=11.0)) for seed in range(100))
    assert false_alarms <= 5 and found == 100


def test_a_record_says_what_was_measured(micro_bundle, tmp_path):
    record = bench(micro_bundle.path, QUICK)
    with load(micro_bundle.path, threads=1) as model:
        assert record.runtime["scan"]["value"] == model.scan.value
        run = lambda: model.run({"image": np.zeros((1, 64, 64, 3), np.uint8)})  # noqa: E731
        for _ in range(20):
            run()
        times = []
        for _ in range(100):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
    assert 0.2 < record.summary_ms["p50"] / np.median(times) < 5  # the unit; benchmarks/bench_agreement.py asks for 5 %
    assert record.summary_ms["min"] <= record.interval_ms[0] <= record.summary_ms["p50"] <= record.interval_ms[1]
    assert record.summary_ms["p50"] <= record.summary_ms["p90"] <= record.summary_ms["p99"] <= record.summary_ms["max"]
    assert record.throughput == pytest.approx(1e3 / record.summary_ms["mean"], rel=0.01)
    assert (
        record.load_ms["fresh"] > record.load_ms["again"] > 0 and record.memory_mb["peak"] > record.memory_mb["before"]
    )
    assert record.settings["batch"] == 1 and record.settings["threads"] == 1
    assert record.layers["kinds"]["scan"] > 0 and record.layers["selection_share"] is None
    assert set(record.stages_ms) == {"preprocess", "inference", "postprocess"} and min(record.stages_ms.values()) > 0
    assert set(record.energy_mj) == {sensor.name for sensor in energy.sensors() if energy.readable(sensor)}
    assert record.bundle["artifact_bytes"] == micro_bundle.size_bytes
    record.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json").samples_ms == record.samples_ms


def test_a_slowed_function_shows():
    """On the real clock: the negative control of everything above."""
    once, twice = (measure(partial(time.sleep, seconds), limit_s=5) for seconds in (0.005, 0.010))
    assert differ(once, twice) and twice.median > 1.3 * once.median >= 1.3 * 5.0


@pytest.mark.slow
def test_the_command(micro_bundle, tmp_path, capsys):
    flags = ["--threads", "1,2", "--streams", "1,2", "--limit", "1", "-o", str(tmp_path), "--json"]
    assert bench_main([str(micro_bundle.path), *flags]) == 0
    rows = json.loads(capsys.readouterr().out)
    measured = [Record.read(tmp_path / row["record"]).settings for row in rows]
    assert [(each["threads"], each["streams"]) for each in measured] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [Path(row["record"]).stem.partition("-t")[2] for row in rows] == ["1-b1", "1-b1-s2", "2-b1", "2-b1-s2"]
    assert bench_main([str(micro_bundle.path), "--end-to-end", "--layers", "--limit", "2", "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "end-to-end" in out and "p50" in out and "peak" in out
    assert re.search(r"Layers    .*scan \d+ %.* sum \d+ % of an inference", out)
    assert re.search(r"layers\.0\.blocks\.0 +[\d.]+ ms +[\d.]+ %   \w+ ", out) and "How       ONNX Runtime" in out


def test_a_target_that_runs_one_inference_at_a_time(coreml_bundle):
    with pytest.raises(UsageError, match="target 'coreml' runs only one inference at a time"):
        load(coreml_bundle.path, streams=2)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--threads", "0"], 2, "--threads 0: use numbers from 1"),
        (["--streams", "0"], 2, "--streams 0: use numbers from 1"),
        (["--batch", "1,x"], 2, "--batch 1,x: use numbers from 1"),
        (["--batch", "3"], 2, "the bundle was exported with --batch 1"),
        (["--limit", "0"], 2, "--limit 0: use seconds"),
        (["--limit", "nan"], 2, "--limit nan: use seconds"),
        (["--openvino-device", "GPU"], 2, "has execution providers in place of devices"),
        (["--scan", "fast"], 2, "fast"),
    ],
)
def test_bad_flags(micro_bundle, tmp_path, capsys, flags, code, says):
    assert bench_main([str(micro_bundle.path), "-o", str(tmp_path / "out"), *flags]) == code
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message and not (tmp_path / "out").exists()


def test_errors_of_the_process_that_measures(tmp_path, monkeypatch):
    with pytest.raises(BundleError, match="does not exist"):
        bench(tmp_path / "nothing", QUICK)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ToolchainError, match="died with code 1"):
        bench(tmp_path / "nothing", QUICK)


def test_a_target_that_does_not_run_here_has_no_latency():
    def model(here: Availability) -> SimpleNamespace:
        return SimpleNamespace(target=SimpleNamespace(name="coreml", availability=lambda: here), emulates="")

    require_runnable(model(Availability(True, {})))
    with pytest.raises(ToolchainError, match=r"'coreml' cannot be measured here\n  a Mac is needed"):
        require_runnable(model(Availability(False, {}, "a Mac is needed")))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"schema_version": 2}', b'{"schema_version": 1, "bundle": {}}']
)
def test_what_is_no_record(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(UsageError, match="record"):
        Record.read(tmp_path / "record.json")


def test_what_may_have_spoilt_a_measurement():
    before, after = device.State((), {}, 3, 1.5), device.State((), {}, 5, 1.6)
    found = device.warnings({"governor": "powersave"}, before, after)
    assert [any(word in text for text in found) for word in ("load 1.50", "powersave", "throttled by heat 2")] == [
        True
    ] * 3
    calm = device.State((), {}, None, 0.1)
    assert device.warnings({"governor": None}, calm, calm) == []


def test_features_and_gpus_are_those_that_the_system_names(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "PROC", tmp_path)
    monkeypatch.setattr(device, "SYS", tmp_path)
    assert device.cpu_features() == [] and device.gpus() == []
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm crc32\n")
    for card, vendor in (("card0", "0x10de"), ("card1", "0x8086"), ("card2", "0x1a03")):
        (tmp_path / "class/drm" / card / "device").mkdir(parents=True)
        (tmp_path / "class/drm" / card / "device/vendor").write_text(f"{vendor}\n")
        (tmp_path / "class/drm" / card / "device/device").write_text("0x46a6\n")
    assert device.cpu_features() == ["asimd", "asimddp", "i8mm"]
    assert device.gpus() == ["NVIDIA 0x46a6", "Intel 0x46a6"]
    (tmp_path / "driver/nvidia/gpus/0000:01").mkdir(parents=True)
    (tmp_path / "driver/nvidia/gpus/0000:01/information").write_text("Model: \t\t NVIDIA Orin\nIRQ: 7\n")
    assert device.gpus() == ["NVIDIA Orin", "Intel 0x46a6"]


def test_this_device_is_described():
    facts, state = device.facts(), device.state()
    assert facts["cores"] >= 1 and facts["cpu"] and facts["system"]
    assert state.load is None or state.load >= 0


def test_the_doctor(capsys, monkeypatch):
    assert doctor_main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["targets"]) == set(load_targets())
    assert found["targets"]["onnx"]["build"] and found["targets"]["onnx"]["versions"]["onnxruntime"]
    assert all(each["hint"] for each in found["targets"].values() if not (each["build"] and each["run"]))
    monkeypatch.setattr("evm_deploy.toolchain.plugins.find_plugin", lambda runtime: None)
    assert doctor_main([]) == 0
    out = capsys.readouterr().out
    assert (
        "the native scan was not built" in out and "install g++" in out and all(name in out for name in load_targets())
    )


FIELDS = {
    "cpuinfo": ["model name\t: CPU of a board", "flags\t: avx2 fma"],
    "meminfo": ["MemTotal:        8151000 kB", "MemFree: 1 kB"],
    "self/status": ["Name:\tpython", "VmHWM:\t  204800 kB"],
}
SPOILT = {"whole": None, "missing": "", "no value": "{name}:", "no number": "{name}:\tmany kB", "nan": "{name}: nan kB"}


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("file", [*FIELDS, "every file"])
def test_fields_of_proc_may_be_missing(file, spoilt, tmp_path, monkeypatch):
    """Leave fields out, as gVisor does: each line alone, each file, and all of /proc and /sys."""
    monkeypatch.setattr(device, "PROC", tmp_path)
    monkeypatch.setattr(device, "SYS", tmp_path / "sys")
    for name, whole in FIELDS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        form = SPOILT[spoilt] if file in (name, "every file") else None
        if form != "" or file != "every file":
            path.write_text("\n".join(line if form is None else form.format(name=line.split(":")[0]) for line in whole))
    facts = device.facts()
    assert facts["memory_mb"] == (7959 if spoilt == "whole" or file in ("cpuinfo", "self/status") else None)
    peak = worker.peak_mb()
    assert peak == (200.0 if spoilt == "whole" or file in ("cpuinfo", "meminfo") else None)
    assert facts["cpu"] and device.state().clocks_mhz == () and device.cpu_features() in ([], ["avx2", "fma"])


def test_a_load_that_is_not_told(monkeypatch):
    def untold():
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(device.os, "getloadavg", untold)
    assert device.state().load is None


def test_a_record_without_memory_is_written_and_printed(tmp_path):
    record = make_record(memory_mb={})
    record.write(tmp_path / "r.json")
    assert "Memory    not reported" in "\n".join(lines(Record.read(tmp_path / "r.json"), tmp_path))


def test_layers_without_time_are_printed():
    for layers in (
        {"how": "h", "sum_ms": 0.0, "of_inference": 0.0, "scan_share": None, "kinds": {"scan": 0.0}, "modules": []},
        {**LAYERS, "sum_ms": 0.0},
    ):
        record = make_record(layers=layers)
        assert lines(record, Path("x")) and layer_lines(record)


OF_ONE = {"memory_mb": 7990, "system": "Linux 7", "python": "3.13", "governor": "powersave", "profile": "x"}
OF_TWO = {"at": "pi@board", "model": "other", "cpu": "other", "machine": "arm64", "usable_cores": 2, "memory_mb": 3900}


@pytest.mark.parametrize("name", OF_ONE)
def test_a_device_stays_the_same(name):
    one = make_record().device
    assert device.key(one) == device.key({**one, name: OF_ONE[name]})


@pytest.mark.parametrize("change", [*OF_TWO.items(), ("system", "Darwin 6"), ("runs_on", "GPU: NVIDIA T4")], ids=str)
def test_another_device_is_another(change):
    one = make_record().device
    assert device.key(one) != device.key({**one, **dict([change])})


@pytest.mark.parametrize(
    ("memory", "sold"), [(3792, "4"), (7837, "8"), (11700, "12"), (15800, "16"), (950, "1"), (62000, "64"), (8192, "8")]
)
def test_memory_is_compared_as_it_is_sold(memory, sold):
    assert device.as_sold(memory) == f"{sold} GB"


@pytest.mark.parametrize(
    "changes",
    [
        {"device": {"at": "pi@board"}},
        {"device": {"runs_on": "GPU: NVIDIA T4"}},
        {"device": {"model": "another"}},
        {"settings": {"device": "GPU"}},
        {"settings": {"device": "HETERO:GPU,CPU"}},
        {"settings": {"cuda_graph": True}},
        {"settings": {"scan": "portable"}},
        {"settings": {"streams": 2}},
        {"settings": {"threads": None}},
        {"settings": {"timed": "end-to-end"}},
    ],
    ids=str,
)
def test_records_of_other_devices_and_settings_are_not_replaced(changes, tmp_path):
    first, other = make_record(), make_record(changes=changes)
    path = record_path(tmp_path, first)
    first.write(path)
    assert record_path(tmp_path, first) == path != record_path(tmp_path, other)
    assert record_path(tmp_path, other).parent == tmp_path


def test_a_file_that_is_no_record_is_not_replaced(tmp_path):
    path = record_path(tmp_path, make_record())
    for i, content in enumerate(("notes", "{}", None)):
        path.write_text(content) if content else path.mkdir()
        assert record_path(tmp_path, make_record()).name == f"{path.stem}-2.json", i
        path.unlink() if content else path.rmdir()
    path.symlink_to("nowhere")
    assert record_path(tmp_path, make_record()) != path


@pytest.mark.slow
def test_one_bundle_that_fails_does_not_hide_the_others(micro_bundle, tmp_path, capsys):
    flags = [str(tmp_path / "nowhere"), str(micro_bundle.path), "--json", "--limit", "1", "-q", "-o", str(tmp_path)]
    assert bench_main(flags) == 2
    bad, good = json.loads(capsys.readouterr().out)
    assert bad["exit_code"] == 2 and "does not exist" in bad["error"] and good["p50"] > 0


@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_the_measuring_process_speaks_its_own_encoding(encoding, micro_bundle, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    assert bench(micro_bundle.path, Settings(threads=1, limit_s=0.5)).summary_ms["p50"] > 0


@pytest.mark.parametrize("out", ["a_file", "a_file/x", "/proc/x"])
@pytest.mark.parametrize("kind", ["a bundle", "a matrix", "a fleet"])
def test_an_output_is_refused_before_work(out, kind, micro_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    (tmp_path / "fleet.toml").write_text('[[board]]\nname = "b"\nhost = "nowhere"')
    subjects = {"a bundle": [str(micro_bundle.path)], "a matrix": ["--matrix"]}
    flags = subjects.get(kind, [str(micro_bundle.path), "--devices", "fleet.toml"])
    for work in ("bench.remote.hosts.opened", "sweep.fleet.run_fleet", "sweep.matrix.run_matrix"):
        monkeypatch.setattr(f"evm_deploy.{work}", lambda *_: pytest.fail("work was begun"))
    assert bench_main([*flags, "-o", out]) == 2
    assert f"cannot write {out}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "bench", "finish", "report"])
def test_a_target_that_is_not_known_is_named(command, micro_bundle, tmp_path, capsys):
    shutil.copytree(micro_bundle.path, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({**manifest, "target": "null"}))
    mains = {
        "run": lambda b: run_main([b, "--selftest"]),
        "bench": lambda b: bench_main([b, "-o", str(tmp_path / "out")]),
        "finish": lambda b: export_main(["--finish", b]),
        "report": lambda b: report_main([b]),
    }
    assert mains[command](str(tmp_path / "b")) == (0 if command == "report" else 2)
    shown = capsys.readouterr()
    assert "null" in shown.out + shown.err and "internal error" not in shown.err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")], ids=str)
def test_json_is_strict(value, micro_bundle, tmp_path):
    """Manifests and records have null in place of what JSON lacks; files of older versions open."""

    def refuse(name):
        raise AssertionError(name)

    kept = {"a": [value, {"b": (value, 1.5)}], "c": "NaN"}
    assert json.loads(strict_json(kept), parse_constant=refuse) == {"a": [None, {"b": [None, 1.5]}], "c": "NaN"}
    accuracy = {**JUDGED, "sqnr_db": value, "ok": False}
    manifest = replace(micro_bundle.manifest, accuracy=accuracy)
    assert json.loads(manifest.to_json(), parse_constant=refuse)["accuracy"]["sqnr_db"] is None
    shutil.copytree(micro_bundle.path, tmp_path / "b")
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(asdict(manifest)))
    assert open_bundle(tmp_path / "b").manifest.accuracy["sqnr_db"] is None
    record = make_record(accuracy=JUDGED)
    replace(record, bundle={**record.bundle, "accuracy": accuracy}).write(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert Record.read(tmp_path / "r.json").bundle["accuracy"]["sqnr_db"] is None
    assert (
        str(Accuracy.from_dict({**JUDGED, "sqnr_db": None})) and not Accuracy.from_dict(accuracy | {"sqnr_db": None}).ok
    )


def test_only_one_function_writes_json_for_others():
    """Every other json.dumps is the input of a hash, or goes to a process or file of another program."""
    found = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "json.dumps(" in p.read_text()}
    assert found == {
        "_util/kept.py",
        "_util/schema.py",
        "bench/bench_on_mac.py",
        "bench/text.py",
        "bench/remote/agent.py",
        "bench/remote/ssh.py",
        "bench/remote/ssh_host.py",
        "bench/remote/supervisor.py",
        "bench/run.py",
        "calib/table.py",
        "demo/pack.py",
        "demo/scenes.py",
        "demo/train.py",
        "export/coreml/package.py",
        "export/description.py",
        "export/litert/__init__.py",
        "export/quantization.py",
        "export/tensorrt/target.py",
        "model/convert.py",
        "model/openmmlab.py",
        "runtimes/providers.py",
        "runtimes/qnn.py",
        "runtimes/tensorrt/build_engine.py",
        "sweep/keys.py",
        "sweep/packed.py",
        "sweep/worker.py",
    }
