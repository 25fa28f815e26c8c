"""Execution providers of ONNX Runtime: which are there, which ran, and that nothing falls back to the CPU unasked."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from evm_deploy import cli
from evm_deploy.bench import worker
from evm_deploy.bench.measurable import require_runnable
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bundle.loaded import LoadedBundle, load
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.report.candidate import Candidate
from evm_deploy.runtimes import providers
from evm_deploy.runtimes.openvino import INFO as OPENVINO
from evm_deploy.runtimes.providers import CPU, PLUGINS, OnnxRuntimeSettings, available, full_name
from evm_deploy.runtimes.registry import configured
from tests.toolchains import need

OPENVINO_EP = "OpenVINOExecutionProvider"
QUICK = Settings(threads=1, limit_s=0.5)
IMAGE = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("cpu", "CPUExecutionProvider"),
        ("CUDA", "CUDAExecutionProvider"),
        ("tensorrt", "TensorrtExecutionProvider"),
        ("openvino:GPU", "OpenVINOExecutionProvider"),
        ("qnnexecutionprovider", "QNNExecutionProvider"),
        ("xnnpack", "XnnpackExecutionProvider"),
        ("coreml", "CoreMLExecutionProvider"),
        ("WebGpuExecutionProvider", "WebGpuExecutionProvider"),
        ("Azure", "AzureExecutionProvider"),
    ],
)
def test_names_are_those_of_onnx_runtime_or_short(given, name):
    assert full_name(given) == name and name in {*onnxruntime.get_all_providers(), *PLUGINS}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("device_id=1", {"device_id": "1"}),
        ("a=1, b=x=y", {"a": "1", "b": "x=y"}),
        ('{"load_config": {"CPU": {}}, "n": 2}', {"load_config": '{"CPU": {}}', "n": "2"}),
        ({"device_id": 1}, {"device_id": "1"}),
        (None, {}),
    ],
)
def test_options_are_pairs_json_or_a_mapping(given, options):
    assert OnnxRuntimeSettings("qnn", given).options == options


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ("", None, "--provider '' has an empty name"),
        ("qnn,,cpu", None, "has an empty name"),
        (["qnn", 3], None, r"providers\[1\] is 3 \(int\)"),
        (None, "a=1", "--provider-option without --provider"),
        ("qnn", "a", "use K=V"),
        ("qnn", "=1", "use K=V"),
        ("qnn", "{a", "is not JSON"),
    ],
)
def test_settings_that_say_nothing_are_refused(given, options, said):
    with pytest.raises(UsageError, match=said):
        OnnxRuntimeSettings(given, options)


def test_the_cpu_by_name_is_the_default_with_counted_nodes(micro_bundle):
    with load(micro_bundle.path) as plain, load(micro_bundle.path, providers=["cpu"]) as named:
        assert plain.nodes == {} and not plain.runs_on
        assert set(named.nodes) == {CPU} and named.nodes[CPU] > 20 and named.runs_on == "CPU"
        assert named.plugin == plain.plugin and named.scan == plain.scan and not named.emulates
        np.testing.assert_array_equal(plain.run({"image": IMAGE})["logits"], named.run({"image": IMAGE})["logits"])
        assert all(check.ok for check in named.selftest())


def test_nothing_falls_back_to_the_cpu_unasked(micro_bundle):
    """Azure is in every stock build and runs nothing: ONNX Runtime itself would take the CPU and say nothing."""
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("a build without Azure")
    with pytest.raises(UsageError, match=r"(\d+) of \1 nodes cannot run on azure: .*MatMul(?s:.*)--provider azure,cpu"):
        load(micro_bundle.path, providers=["azure"])
    with pytest.raises(UsageError, match="no node of the model runs on azure: all run on cpu"):
        load(micro_bundle.path, providers="azure,cpu")


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ("fpga", UsageError, r"'fpga' is unknown; available with ONNX Runtime [\d.]+: .*cpu"),
        ("Rknpu", ToolchainError, r"rknpu is not installed; available .*cpu(?s:.*)use a build"),
        ("cpu,cpu", UsageError, "cpu takes every node"),
        ("cpu:GPU", UsageError, "only plugins have devices"),
    ],
)
def test_a_provider_that_there_is_not_is_an_error_with_those_there_are(given, kind, said, micro_bundle):
    with pytest.raises(kind, match=said):
        load(micro_bundle.path, providers=given)


def test_a_missing_plugin_says_what_to_install(micro_bundle, monkeypatch):
    gone = replace(PLUGINS[OPENVINO_EP], module="no_such_module")
    monkeypatch.setattr(providers, "PLUGINS", {OPENVINO_EP: gone})
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ToolchainError, match=r"openvino is not installed(?s:.*)pip install onnxruntime-ep-openvino"):
        load(micro_bundle.path, providers="openvino")


def test_an_old_release_that_does_not_tell_is_refused():
    old = SimpleNamespace(InferenceSession=object, __version__="1.17")
    with pytest.raises(ToolchainError, match=r"1\.17 does not tell which execution provider runs a node"):
        providers.open_session(old, b"", None, OnnxRuntimeSettings("cpu"), None)


def test_other_targets_have_none():
    with pytest.raises(UsageError, match=r"target 'openvino' has no execution providers\n  leave --provider out"):
        configured(OPENVINO, {"providers": "cpu"})


def test_the_commands_take_and_tell_them(micro_bundle, tmp_path, capsys):
    flags = [str(micro_bundle.path), "--selftest", "--provider", "cpu"]
    assert cli.run_main(flags) == 0
    assert f"nodes ran on {CPU}" in capsys.readouterr().out
    assert cli.run_main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"][CPU] > 20
    assert cli.run_main([str(micro_bundle.path), "--selftest", "--provider", "rknpu"]) == 3
    record = worker.work(micro_bundle.path, QUICK.with_own(providers="cpu"))
    assert record.runtime["nodes"][CPU] > 20 and record.settings["providers"] == "cpu" and record.layers
    record.write(tmp_path / "record.json")
    read = Record.read(tmp_path / "record.json")
    assert Candidate.of_record(read).label == "onnx fp32, cpu"
    assert Settings.of(read.settings).own == (("providers", "cpu"),)


def test_what_is_emulated_is_not_timed(micro_bundle, monkeypatch):
    monkeypatch.setattr(LoadedBundle, "emulates", "qnn: its library emulates the NPU here")
    with load(micro_bundle.path) as model, pytest.raises(ToolchainError, match=r"emulates the NPU(?s:.*)--host"):
        require_runnable(model)


# A plugin with two devices, without a library ------------------------------------------------------------------------


class FakeSession:
    def __init__(self, source, options):
        self.options = options

    def get_provider_graph_assignment_info(self):
        nodes = [SimpleNamespace(op_type=op, domain="") for op in ("Conv", "Scan")]
        on_gpu = SimpleNamespace(ep_name=OPENVINO_EP, get_nodes=lambda: nodes[: self.options.takes])
        rest = SimpleNamespace(ep_name=CPU, get_nodes=lambda: nodes[self.options.takes :])
        return [on_gpu, rest]

    def disable_fallback(self):
        pass


class FakeOptions:
    def __init__(self, takes):
        self.takes, self.entries = takes, {}

    def add_session_config_entry(self, key, value):
        self.entries[key] = value

    def add_provider_for_devices(self, devices, options):
        self.devices, self.given = devices, options


def fake_runtime(monkeypatch, registered):
    def device(kind):
        metadata = {"FULL_DEVICE_NAME": f"The {kind}"}
        return SimpleNamespace(
            ep_name=OPENVINO_EP, ep_metadata=metadata, device=SimpleNamespace(type=SimpleNamespace(name=kind))
        )

    module = SimpleNamespace(get_library_path=lambda: "plugin.so")
    monkeypatch.setattr(providers.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(providers, "find_spec", lambda name: True)
    return SimpleNamespace(
        __version__="9.9",
        InferenceSession=FakeSession,
        get_available_providers=lambda: [CPU, f"{OPENVINO_EP}.AUTO"],
        get_all_providers=lambda: [CPU],
        get_ep_devices=lambda: [device("CPU"), device("GPU")] if registered else [],
        register_execution_provider_library=lambda name, path: registered.append((name, path)),
    )


def test_a_plugin_is_registered_once_and_gives_the_device_that_is_asked_for(monkeypatch):
    registered = []
    ort = fake_runtime(monkeypatch, registered)
    for given, kind in (("openvino", "CPU"), ("openvino:gpu", "GPU")):
        options = FakeOptions(2)
        opened = providers.open_session(ort, b"", options, OnnxRuntimeSettings(given, "a=1"), 3)
        assert opened.runs_on == f"{kind}: The {kind}" and opened.nodes == {OPENVINO_EP: 2} and not opened.emulates
        cpu = json.loads(options.given["load_config"])["CPU"]
        assert cpu == {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "3"} and options.given["a"] == "1"
    assert registered == [(OPENVINO_EP, "plugin.so")]
    with pytest.raises(UsageError, match="finds no such device here; it finds: CPU, GPU"):
        providers.open_session(ort, b"", FakeOptions(2), OnnxRuntimeSettings("openvino:npu"), None)
    assert f"{OPENVINO_EP}.AUTO" not in available(ort)


def test_nodes_that_are_left_over_are_named_unless_the_cpu_may_run_them(monkeypatch):
    ort = fake_runtime(monkeypatch, [])
    with pytest.raises(UsageError, match=r"1 of 2 nodes cannot run on openvino: Scan\n.*--provider openvino,cpu"):
        providers.open_session(ort, b"", FakeOptions(1), OnnxRuntimeSettings("openvino"), None)
    opened = providers.open_session(ort, b"", FakeOptions(1), OnnxRuntimeSettings("openvino,cpu"), None)
    assert opened.nodes == {CPU: 1, OPENVINO_EP: 1} and opened.runs_on == "CPU: The CPU, CPU"
    with pytest.raises(UsageError, match="no node of the model runs on openvino"):
        providers.open_session(ort, b"", FakeOptions(0), OnnxRuntimeSettings("openvino,cpu"), None)


def test_emulators_say_so(monkeypatch):
    monkeypatch.setattr(providers, "host_platform", lambda: "linux-x86_64")
    assert "emulates" in providers.npu_emulator() and not PLUGINS[OPENVINO_EP].emulates()
    monkeypatch.setattr(providers, "host_platform", lambda: "linux-aarch64")
    assert providers.npu_emulator() == ""


# The plugin of OpenVINO ---------------------------------------------------------------------------------------------


def test_openvino_computes_the_whole_model(micro_bundle):
    need("OpenVINO in ONNX Runtime")
    with load(micro_bundle.path, threads=1, providers=["openvino"]) as model, load(micro_bundle.path) as plain:
        assert set(model.nodes) == {OPENVINO_EP} and model.runs_on.startswith("CPU: ")
        assert model.scan.value == "portable" and "no native kernels" in model.scan.reason
        want = plain.run({"image": IMAGE})["logits"]
        assert np.abs(model.run({"image": IMAGE})["logits"] - want).max() < 1e-5 * np.abs(want).max()
        assert all(check.ok for check in model.selftest())
    with pytest.raises(UsageError, match="nodes cannot run on openvino: EVSSBlock"):
        load(micro_bundle.path, providers=["openvino"], scan="plugin")


def test_openvino_beside_native_kernels_and_its_records(micro_bundle):
    need("OpenVINO in ONNX Runtime")
    with load(micro_bundle.path, threads=1, providers=["openvino", "cpu"], scan="plugin") as model:
        assert set(model.nodes) == {CPU, OPENVINO_EP} and all(check.ok for check in model.selftest())
    record = worker.work(micro_bundle.path, QUICK.with_own(providers="openvino"))
    assert set(record.runtime["nodes"]) == {OPENVINO_EP} and record.layers == {}
    assert record.device["runs_on"].startswith("CPU: ")
