"""Context binaries for Qualcomm's NPU: settings, refusals, passes on the graph, and QNN's faults on its emulator."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from evm_deploy import cli
from evm_deploy.bundle.loaded import load
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export import qnn
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.qnn.context import compile_context
from evm_deploy.export.qnn.graph import cast_by_int32, floor_exponents, steps_per_chunk
from evm_deploy.export.qnn.settings import SOCS, QnnSettings
from evm_deploy.export.target import check_plan
from evm_deploy.runtimes import qnn as runtime
from evm_deploy.runtimes.base import RunOptions
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from tests.toolchains import need


def model_of(*nodes, dtype=TensorProto.FLOAT, shape=(1, 16)):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", dtype, shape)], [value("y", TensorProto.FLOAT, shape)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def exponential():
    return model_of(helper.make_node("Exp", ["x"], ["y"], name="e"))


def cast():
    return model_of(helper.make_node("Cast", ["x"], ["y"], name="c", to=TensorProto.FLOAT), dtype=TensorProto.UINT8)


def on_cpu(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def on_emulator(model, x):
    with OnnxRuntime(model.SerializeToString(), 1, settings=runtime.on_npu(QnnSettings().options)) as session:
        return session.run({"x": x})["y"]


LOW = np.linspace(-320, 0, 16, dtype=np.float32)[None]
BYTES = np.arange(0, 256, 17, dtype=np.uint8)[None]


@pytest.mark.parametrize(("soc", "arch"), [(number, arch) for number, (arch, _) in SOCS.items()])
def test_known_socs_have_their_version(soc, arch):
    settings = QnnSettings(soc)
    assert settings.architecture == arch and settings.options["htp_arch"] == str(arch)
    assert settings.options["soc_model"] == str(soc) and settings.name.startswith("SM")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"soc": 1234}, r"--soc 1234 is unknown; known: 43 \(SM8550\)(?s:.*)--htp-arch"),
        ({"soc": 0}, "use numbers from 1"),
        ({"soc": 57, "htp_arch": 73}, "SoC 57 has version 75"),
    ],
)
def test_settings_that_name_no_soc_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        QnnSettings(**given)
    assert QnnSettings(1234, 81).architecture == 81 and QnnSettings(1234, 81).name == "SoC 1234"


def test_plans_that_a_context_cannot_have():
    for batch in ("dynamic", "1:2:4"):
        with pytest.raises(UsageError, match="static shapes, and --batch"):
            check_plan(qnn.TARGET, ExportPlan("qnn", batch=batch))
    with pytest.raises(UsageError, match="has no precision 'fp32'; it has: fp16"):
        check_plan(qnn.TARGET, ExportPlan("qnn", "fp32"))


def test_without_the_plugin_the_commands_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"onnxruntime-qnn is not installed\n  pip install .*\[run-qnn\]"):
        runtime.open_(tmp_path / "model.onnx", RunOptions())
    with pytest.raises(ToolchainError, match="onnxruntime-qnn is not installed"):
        compile_context(exponential(), tmp_path / "c.onnx", QnnSettings())
    missing = {name: "1" for name in qnn.TARGET.packages if name != runtime.MODULE}
    monkeypatch.setattr("evm_deploy.export.target.package_versions", lambda names: missing)
    assert cli.export_main(["--target", "qnn", "-q", "-o", str(tmp_path)]) == 3
    assert "packages are missing" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_exponents_are_limited_where_the_exponential_is_zero_anyway():
    plain, limited = exponential(), exponential()
    assert floor_exponents(limited) == 1 and floor_exponents(model_of(helper.make_node("Abs", ["x"], ["y"]))) == 0
    onnx.checker.check_model(limited, full_check=True)
    want = np.float16(on_cpu(plain, LOW))
    np.testing.assert_array_equal(np.float16(on_cpu(limited, LOW)), want)


def test_bytes_are_cast_in_two_steps():
    model = cast()
    assert cast_by_int32(model) == 1 and [node.op_type for node in model.graph.node] == ["Cast", "Cast"]
    np.testing.assert_array_equal(on_cpu(model, BYTES), BYTES.astype(np.float32))
    assert cast_by_int32(exponential()) == 0


def test_there_are_never_as_many_chunks_as_directions():
    for K in range(1, 9):
        for L in range(2, 200):
            T = steps_per_chunk(K, L)
            assert 1 <= T <= L and -(-L // T) != K
    assert steps_per_chunk(1, 1) == 1 and steps_per_chunk(4, 784) == 14


@pytest.mark.parametrize(("make", "passed", "x"), [(exponential, floor_exponents, LOW), (cast, cast_by_int32, BYTES)])
def test_the_faults_are_there_and_avoided(make, passed, x):
    """A release that computes these right makes this test fail: then the pass can go."""
    need("QNN in ONNX Runtime")
    plain, changed = make(), make()
    passed(changed)
    want = on_cpu(plain, x)
    assert np.abs(on_emulator(changed, x) - want).max() <= 2e-3 * max(1.0, np.abs(want).max())
    assert np.abs(on_emulator(plain, x) - want).max() > 1


def test_a_node_that_the_npu_does_not_take_is_named(tmp_path):
    need("QNN in ONNX Runtime")
    model = model_of(helper.make_node("Det", ["x"], ["z"], name="d"), helper.make_node("Mul", ["x", "z"], ["y"]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 16
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 16
    with pytest.raises(UsageError, match="the NPU does not take the network: 1 of 2 nodes cannot run on qnn: Det"):
        compile_context(model, tmp_path / "c.onnx", QnnSettings())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_export_of_images_is_one_context_and_is_not_timed(micro, tmp_path, capsys):
    need("QNN in ONNX Runtime")
    assert cli.export_main([str(micro), "--target", "htp", "--imgsz", "64", "-q", "-o", str(tmp_path)]) == 0
    made = tmp_path / "micro_64-qnn-fp16-64x64"
    assert [node.op_type for node in onnx.load(made / "model.onnx").graph.node] == ["EPContext"]
    with load(made) as model:
        assert model.nodes == {"QNNExecutionProvider": 1} and model.manifest.details["soc_name"] == "SM8650"
        assert all(check.ok for check in model.selftest())
        assert any("emulator" in note for note in model.manifest.notes)
    capsys.readouterr()
    assert cli.bench_main([str(made), "-q", "-o", str(tmp_path / "bench")]) == 3
    assert "emulates the NPU" in capsys.readouterr().err
