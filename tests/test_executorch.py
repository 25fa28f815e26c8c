"""ExecuTorch: operators of the hub graph in torch, programs and their runtime, our library, refusals."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from evm_deploy import cli
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.manifest import Decision
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.export import executorch
from evm_deploy.export.executorch.graph import widen_convolutions
from evm_deploy.export.executorch.module import GraphModule
from evm_deploy.export.executorch.operators import OPERATORS
from evm_deploy.export.executorch.program import lower
from evm_deploy.export.executorch.quantized import prepare
from evm_deploy.export.executorch.scans import ExecuTorchArtifact, ExecuTorchScanAccess, scan_program
from evm_deploy.export.hub.graph import scan_sites
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import check_plan
from evm_deploy.runtimes.base import RunOptions
from evm_deploy.runtimes.executorch import ExecuTorchRuntime
from evm_deploy.scan.onnx_function import selective_scan_function
from evm_deploy.scan.reference import large_delta_case, selective_scan
from evm_deploy.toolchain import executorch_library
from tests.toolchains import need

FLOAT, INT = np.float32, np.int64
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(FLOAT)


X, IMAGES = normal(2, 6, 5), normal(2, 4, 7, 6)
LESS = np.abs(normal(2, 6, 5)) + 0.5


def ints(*values):
    return np.array(values, INT)


#: (operator, input, constant inputs or None, attributes)
CASES = [
    *((name, X, [], {}) for name in ("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "Identity", "LeakyRelu")),
    *((name, X, [], {}) for name in ("Mish", "Neg", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Tanh")),
    *((name, X, [], {}) for name in ("HardSwish", "HardSigmoid", "Softmax", "LogSoftmax", "Flatten", "Transpose")),
    *((name, LESS, [], {}) for name in ("Log", "Sqrt", "Reciprocal")),
    *((name, X, [LESS], {}) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")),
    *((name, X, [X.round()], {}) for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    *((f"Reduce{how}", X, [ints(1, -1)], {"keepdims": 0}) for how in ("Mean", "Sum", "Max", "Min", "Prod", "L2")),
    ("ReduceSumSquare", X, [ints(0)], {}),
    ("ReduceMean", X, [], {}),
    ("Pow", LESS, [np.array(1.7, FLOAT)], {}),
    ("Mod", X, [LESS], {"fmod": 1}),
    ("Div", np.arange(-7, 8), [ints(3)], {}),
    ("And", X > 0, [X < 1], {}),
    ("Or", X > 0, [X < 1], {}),
    ("Xor", X > 0, [X < 1], {}),
    ("Not", X > 0, [], {}),
    ("Where", X > 0, [X, LESS], {}),
    ("PRelu", X, [np.float32([0.3])], {}),
    ("Gelu", X, [], {"approximate": "tanh"}),
    ("Gelu", X, [], {}),
    ("Elu", X, [], {"alpha": 0.4}),
    ("Softmax", X, [], {"axis": 1}),
    ("Clip", X, [np.float32(-0.5), np.float32(0.5)], {}),
    ("Clip", X, [None, np.float32(0.5)], {}),
    ("Cast", X, [], {"to": TensorProto.INT32}),
    ("Concat", X, [X], {"axis": -1}),
    ("CumSum", X, [ints(1)], {}),
    ("Einsum", X, [normal(5, 3)], {"equation": "bij,jk->bik"}),
    ("Expand", X[:, :1], [ints(2, 6, 5)], {}),
    ("Gather", X, [np.array(-2, INT)], {"axis": 1}),
    ("Gather", X, [ints(3, 0, -1)], {"axis": 1}),
    ("Gather", X, [ints(3, 0, 1, 1).reshape(2, 2)], {"axis": -1}),
    ("GatherElements", X, [np.zeros((2, 6, 2), INT)], {"axis": 2}),
    ("GatherND", X, [np.array([[[0, 3], [1, -1]]], INT)], {}),
    ("GatherND", X, [np.array([[[3], [0]], [[5], [2]]], INT)], {"batch_dims": 1}),
    ("ArgMax", X, [], {"axis": 1, "keepdims": 0}),
    ("ArgMin", X, [], {"axis": -1}),
    ("TopK", X, [ints(3)], {"axis": 1}),
    ("MatMul", X, [normal(5, 4)], {}),
    ("Gemm", X[0], [normal(5, 4), normal(4)], {"alpha": 0.5, "beta": 2.0}),
    ("Gemm", X[0], [normal(4, 5), normal(4)], {"transB": 1}),
    ("Gemm", X[0], [normal(6, 4)], {"transA": 1}),
    ("Reshape", X, [ints(0, 3, -1)], {}),
    ("Transpose", X, [], {"perm": [2, 0, 1]}),
    ("Flatten", X, [], {"axis": 2}),
    ("Squeeze", X[:, :1], [ints(1)], {}),
    ("Squeeze", X[:1, :, :1], [], {}),
    ("Unsqueeze", X, [ints(0, -1)], {}),
    ("Split", X, [ints(2, 4)], {"axis": 1}),
    ("Split", X, [], {"axis": 1, "num_outputs": 2}),
    ("Slice", X, [ints(1), ints(2**40), ints(-1), ints(2)], {}),
    ("Slice", X, [ints(-1, 0), ints(-(2**40), 1), ints(1, 0), ints(-2, 1)], {}),
    ("Pad", X, [ints(0, 1, 0, 0, 0, 2), np.float32(3)], {}),
    ("Pad", X, [ints(1, -1), None, ints(2)], {}),
    ("Pad", IMAGES, [ints(0, 0, 1, 2, 0, 0, 2, 1)], {"mode": "reflect"}),
    ("Pad", IMAGES, [ints(0, 0, 1, 2, 0, 0, 2, 1)], {"mode": "edge"}),
    ("Tile", X, [ints(1, 2, 3)], {}),
    ("Conv", IMAGES, [normal(6, 2, 3, 3), normal(6)], {"group": 2, "pads": [1, 1, 1, 1], "strides": [2, 1]}),
    ("Conv", IMAGES, [normal(3, 4, 2, 3)], {"pads": [0, 1, 1, 2], "dilations": [2, 1]}),
    ("Conv", X, [normal(6, 1, 3), normal(6)], {"group": 6, "pads": [2, 0]}),
    ("ConvTranspose", IMAGES, [normal(4, 3, 2, 2), normal(3)], {"strides": [2, 2]}),
    ("MaxPool", IMAGES, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("MaxPool", IMAGES, [], {"kernel_shape": [2, 3], "pads": [0, 1, 1, 0], "ceil_mode": 1}),
    ("AveragePool", IMAGES, [], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0]}),
    ("AveragePool", IMAGES, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("GlobalAveragePool", IMAGES, [], {}),
    ("LayerNormalization", X, [normal(6, 5), normal(6, 5)], {"axis": 1}),
    ("LayerNormalization", X, [normal(5)], {"epsilon": 1e-3}),
    ("BatchNormalization", IMAGES, [normal(4), normal(4), normal(4), LESS[0, :4, 0]], {}),
    ("InstanceNormalization", IMAGES, [normal(4), normal(4)], {}),
    ("GroupNormalization", IMAGES, [normal(4), normal(4)], {"num_groups": 2}),
    ("DepthToSpace", IMAGES, [], {"blocksize": 2}),
    ("DepthToSpace", IMAGES, [], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", normal(1, 2, 4, 6), [], {"blocksize": 2}),
    (
        "Resize",
        IMAGES,
        [None, np.float32([1, 1, 2, 2])],
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    ("Resize", IMAGES, [None, None, ints(2, 4, 9, 5)], {"mode": "linear"}),
    (
        "Resize",
        IMAGES,
        [None, None, ints(2, 4, 14, 11)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    ("Resize", IMAGES, [None, None, ints(2, 4, 14, 11)], {"mode": "cubic"}),
]


def graph_of(op, x, others, attributes, opset=21, outputs=None):
    """A model of one node, whose inputs beside the first are constants."""
    count = outputs or (2 if op in ("Split", "TopK") else 1)
    names = [f"y{i}" for i in range(count)]
    constants = {f"c{i}": value for i, value in enumerate(others) if value is not None}
    given = ["x", *(f"c{i}" if value is not None else "" for i, value in enumerate(others))]
    node = helper.make_node(op, given, names, name="n", **attributes)
    kind = helper.np_dtype_to_tensor_dtype(np.asarray(x).dtype)
    value = helper.make_tensor_value_info("x", kind, np.asarray(x).shape)
    tensors = [numpy_helper.from_array(np.asarray(each), name) for name, each in constants.items()]
    outs = [onnx.ValueInfoProto(name=name) for name in names]
    graph = helper.make_graph([node], "g", [value], outs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_operators_are_those_of_onnx(case):
    x = case[1]
    model = graph_of(*case)
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    with torch.no_grad():
        have = GraphModule(model, portable=True)(torch.from_numpy(np.array(x)))
    assert len(have) == len(want)
    for mine, its in zip(have, want, strict=True):
        assert mine.shape == its.shape and mine.numpy().dtype == its.dtype
        np.testing.assert_allclose(mine.numpy(), its, rtol=2e-6, atol=2e-6)


def test_every_operator_has_a_case():
    assert {case[0] for case in CASES} | {"QuantizeLinear", "DequantizeLinear"} == set(OPERATORS)  # below, both


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (("Det", normal(3, 3), [], {}), "n: the operator Det has no form in ExecuTorch"),
        (("CumSum", X, [ints(1)], {"reverse": 1}), r"n \(CumSum\) has no form in ExecuTorch: exclusive or reverse"),
        (("Resize", IMAGES, [None, None, ints(2, 4, 9, 5)], {}), "the form of the resize is"),
        (("Pad", X, [ints(0, 0, 0, 0, 0, 2)], {"mode": "wrap"}), "mode is wrap, possible is constant, edge, reflect"),
        (("MaxPool", IMAGES, [], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}), "auto_pad is SAME_UPPER"),
        (("ConvTranspose", IMAGES, [normal(4, 3, 2, 2)], {"auto_pad": "VALID"}), r"n \(ConvTranspose\) has no form"),
    ],
)
def test_forms_without_a_function_are_refused_by_the_node(case, said):
    with pytest.raises(UsageError, match=said):
        GraphModule(graph_of(*case), portable=True)(torch.from_numpy(case[1]))


def test_a_shape_that_depends_on_the_image_is_refused():
    model = graph_of("Reshape", np.zeros(4, INT), [], {})
    model.graph.node[0].input[:] = ["x", "x"]
    with pytest.raises(UsageError, match=r"n \(Reshape\) reads x, which depends on the image"):
        GraphModule(model, portable=True)


def test_plans_that_a_program_cannot_have():
    for batch in ("dynamic", "1:2:4"):
        with pytest.raises(UsageError, match="fixed sizes, and --batch"):
            check_plan(executorch.TARGET, ExportPlan("executorch", batch=batch))
    for nms in ("graph", "pipeline"):
        assert nms not in executorch.TARGET.nms
    with pytest.raises(UsageError, match="has no precision 'fp16'; it has: fp32"):
        check_plan(executorch.TARGET, ExportPlan("pte", "fp16"))


def test_without_the_package_the_commands_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(executorch_library, "find_spec", lambda name: None)
    monkeypatch.setattr(executorch_library, "_loaded", [])
    with pytest.raises(ToolchainError, match=r"executorch is not installed\n  pip install .*\[run-executorch\]"):
        ExecuTorchRuntime(tmp_path / "model.pte")
    missing = {name: "1" for name in executorch.TARGET.packages if name != "executorch"}
    monkeypatch.setattr("evm_deploy.export.target.package_versions", lambda names: missing)
    assert cli.export_main(["--target", "pte", "-q", "-o", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert "packages are missing" in said and "[executorch]" in said and not list(tmp_path.iterdir())


def test_without_a_compiler_the_library_says_what_to_install(tmp_path, monkeypatch):
    need("ExecuTorch")
    monkeypatch.setattr(executorch_library.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler(?s:.*)environment variable CXX"):
        executorch_library.compile_in(tmp_path)


def test_a_library_of_another_release_is_refused(tmp_path):
    need("ExecuTorch")
    path = tmp_path / "evm_executorch.so"
    path.write_bytes(b"no library")
    with pytest.raises(ToolchainError, match="is not an ExecuTorch library of evm-deploy"):
        executorch_library.check_release(path)
    path.write_bytes(b"..evm library for ExecuTorch 1.2.0\0..")
    with pytest.raises(ToolchainError, match=r"compiled for ExecuTorch 1.2.0, but ExecuTorch 1\S+ is installed"):
        executorch_library.check_release(path)
    with pytest.raises(ToolchainError, match="cannot be read: No such file"):
        executorch_library.check_release(tmp_path / "none.so")


# --------------------------------------------------------------------------------------------------- programs that run


def hub(opset=20):
    """A graph with the scan's functions, as `scan_alone` reads it."""
    graph = helper.make_graph([], "g", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("evm", 1)])
    model.functions.append(selective_scan_function(opset))
    return model


def case_of(shape: ScanShape, batch=1):
    K, L, D, N = shape
    scan = {"u": normal(batch, K, L, D), "delta": normal(batch, K, L, D) - 2, "A": -np.exp(normal(K, D, N))}
    scan |= {"B": normal(batch, K, L, N), "C": normal(batch, K, L, N), "skip": normal(K, D), "bias": normal(K, D)}
    return {name: np.float32(value) for name, value in scan.items()}


def written(folder: Path, program: bytes) -> Path:
    path = folder / "program.pte"
    path.write_bytes(program)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("portable", [False, True], ids=["operator", "standard operations"])
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "dt"])
def test_a_scan_is_exact(portable, softplus, tmp_path):
    need("ExecuTorch")
    scan = case_of(ScanShape(2, 5, 7, 3), batch=2)
    if not softplus:
        scan["delta"] = np.abs(scan["delta"])
    probe = large_delta_case({**scan, **({} if softplus else {"delta_softplus": False})}, RNG)
    program = scan_program(hub(), {"b": 2, "K": 2, "L": 5, "D": 7, "N": 3}, portable=portable, softplus=softplus)
    with ExecuTorchRuntime(written(tmp_path, program)) as runtime:
        assert list(runtime.inputs) == ["u", "delta", "A", "B", "C", "skip", "bias"]
        for given in (scan, {name: np.float32(probe[name]) for name in scan}):
            want = selective_scan(**given, **({} if softplus else {"delta_softplus": False}))
            have = runtime.run(given)["y"]
            assert np.abs(have - want).max() <= 2e-6 * max(1, np.abs(want).max())


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A program that multiplies by two, and has two outputs."""
    need("ExecuTorch")
    model = graph_of("Split", X, [ints(2, 4)], {"axis": 1})
    model.graph.node.add(op_type="Add", input=["y0", "y0"], output=["double"])
    model.graph.output[0].name = "double"
    return written(tmp_path_factory.mktemp("program"), lower(model, portable=True).file)


@pytest.mark.slow
def test_names_types_and_sizes_are_in_the_file(program):
    with ExecuTorchRuntime(program) as runtime:
        assert [str(spec) for spec in runtime.inputs.values()] == ["x float32[2, 6, 5]"]
        assert [str(spec) for spec in runtime.outputs.values()] == ["double float32[2, 2, 5]", "y1 float32[2, 4, 5]"]
        found = runtime.run({"x": X})
    np.testing.assert_array_equal(found["double"], 2 * X[:, :2])
    np.testing.assert_array_equal(found["y1"], X[:, 2:])


@pytest.mark.slow
def test_strided_arrays_are_read_right_and_results_are_the_callers(program):
    with ExecuTorchRuntime(program) as runtime:
        first = runtime.run({"x": np.ascontiguousarray(X.transpose(2, 1, 0)).transpose(2, 1, 0)})
        kept = first["y1"].copy()
        runtime.run({"x": X + 1})
    np.testing.assert_array_equal(first["y1"], kept)
    np.testing.assert_array_equal(kept, X[:, 2:])


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "none"])
def test_a_damaged_file_is_an_error(program, tmp_path, damage):
    path, content = tmp_path / "model.pte", program.read_bytes()
    if damage != "none":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"text" * 100}[damage])
    with pytest.raises(BundleError, match=f"ExecuTorch cannot open {re.escape(str(path))}: the file is no program"):
        ExecuTorchRuntime(path)


@pytest.mark.slow
def test_one_pool_of_threads_serves_every_program(program):
    with ExecuTorchRuntime(program, RunOptions(threads=2)) as first:
        with (
            ExecuTorchRuntime(program, RunOptions(threads=2)),
            ExecuTorchRuntime(program, RunOptions(threads=1)) as one,
        ):
            np.testing.assert_array_equal(one.run({"x": X})["y1"], first.run({"x": X})["y1"])
        with pytest.raises(UsageError, match="an open program uses its 2 threads\n  close the other model"):
            ExecuTorchRuntime(program, RunOptions(threads=3))
    with ExecuTorchRuntime(program, RunOptions(threads=3)) as alone:
        assert alone.run({"x": X})["y1"].shape == (2, 4, 5)


@pytest.fixture(scope="module")
def bundle(micro, tmp_path_factory):
    need("ExecuTorch")
    return export(micro, ExportPlan("executorch", imgsz=(64, 64)), tmp_path_factory.mktemp("bundle"))


@pytest.mark.slow
def test_blocks_are_operators_and_the_manifest_counts_the_rest(bundle):
    details = bundle.manifest.details
    assert details["operators"]["EVSSBlock.default"] == len(bundle.manifest.parity["scans"]) == 2
    assert details["delegates"] >= 2 and details["executorch"] == executorch_library.installed_release()
    (library,) = bundle.manifest.plugins.values()
    assert executorch_library.release_of(bundle.path / library) == details["executorch"]


ALONE = """
import sys
from dataclasses import replace
sys.modules.update(dict.fromkeys(("torch", "executorch.exir", "executorch.extension", "onnx", "evm_deploy.export")))
from evm_deploy import load
with load(sys.argv[1], scan=sys.argv[2]) as model:
    assert all(check.ok for check in model.selftest()), model.selftest()
    print(model.scan.value, model.isa)
"""


@pytest.mark.slow
@pytest.mark.parametrize("scan", ["auto", "bundled"])
def test_the_selftest_passes_without_torch_and_without_executorchs_python(bundle, scan):
    done = subprocess.run([sys.executable, "-c", ALONE, str(bundle.path), scan], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plugin ")


@pytest.mark.slow
def test_a_second_library_is_refused_and_a_copy_is_the_same(bundle, tmp_path):
    with load(bundle.path) as model, load(bundle.path, scan="bundled") as copy:
        pixels = np.zeros((1, 64, 64, 3), np.uint8)
        np.testing.assert_array_equal(model.run({"image": pixels})["logits"], copy.run({"image": pixels})["logits"])
    (inside,) = bundle.manifest.plugins.values()
    other = Path(shutil.copy(bundle.path / inside, tmp_path))
    other.write_bytes(other.read_bytes() + b"\0")
    with pytest.raises(ToolchainError, match=r"operators once in a process(?s:.*)start another process"):
        executorch_library.open_library(other)


@pytest.mark.slow
def test_the_readmes_python_runs_in_executorchs_own_runtime(bundle):
    text = (bundle.path / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import ctypes.*?)```", text, re.DOTALL)
    code += "\nprint(outputs[0].shape, *outputs[0].flatten()[:2].tolist())\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=bundle.path)
    assert done.returncode == 0, done.stderr
    with load(bundle.path) as model:
        want = model.run({"image": np.zeros((1, 64, 64, 3), np.uint8)})["logits"]
    assert done.stdout.startswith("torch.Size([1, 4])") or f"torch.Size({list(want.shape)})" in done.stdout
    have = [float(each) for each in done.stdout.split()[-2:]]
    np.testing.assert_allclose(have, want[0, :2], rtol=1e-5)


def test_convolutions_over_one_axis_get_a_second():
    x = normal(2, 6, 5)
    model = graph_of("Conv", x, [normal(6, 2, 3), normal(6)], {"group": 3, "pads": [2, 1], "strides": [2]})
    second = model.graph.node.add()
    second.CopyFrom(model.graph.node[0])
    second.output[0], second.name = "again", "m"  # the same weights
    model.graph.output.add(name="again")
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    assert widen_convolutions(model) == 2 and widen_convolutions(model) == 0
    assert [node.op_type for node in model.graph.node] == ["Unsqueeze", "Conv", "Squeeze"] * 2
    assert sorted(tensor.name for tensor in model.graph.initializer) == ["c0", "c0/widened", "c1", "widened/axis"]
    have = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    for mine, its in zip(have, want, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-6)
    assert widen_convolutions(graph_of("Conv", IMAGES, [normal(6, 4, 3, 3)], {})) == 0


@pytest.mark.slow
def test_scans_with_equal_constants_are_told_apart(tmp_path):
    """The program runs independent scans in another order than the graph."""
    need("ExecuTorch")
    model, scan = hub(), case_of(ScanShape(1, 4, 3, 2))
    add = model.graph.node.add
    model.graph.input.extend(helper.make_tensor_value_info(k, 1, scan[k].shape) for k in ("u", "delta", "B", "C"))
    model.graph.initializer.extend(numpy_helper.from_array(scan[name], name) for name in ("A", "skip", "bias"))
    add(op_type="Sigmoid", input=["u"], output=["v"], name="s/Sigmoid")
    for reads, writes in (("v", "late"), ("u", "early")):
        inputs = [reads, "delta", "A", "B", "C", "skip", "bias"]
        add(op_type="SelectiveScan", input=inputs, output=[writes], name=f"{writes}/SelectiveScan", domain="evm")
        model.graph.output.add(name=writes)
    program = lower(model, portable=False)
    path = written(tmp_path, program.file)
    facts = {"scans": scan_sites(model)}
    artifact = ExecuTorchArtifact(path, Decision("plugin", ""), facts, graph=model, order=program.scans)
    feeds = {name: scan[name] for name in ("u", "delta", "B", "C")}
    late, early = ExecuTorchScanAccess(artifact, None).in_situ(feeds)
    np.testing.assert_allclose(late["u"], 1 / (1 + np.exp(-scan["u"])), rtol=1e-5)
    np.testing.assert_array_equal(early["u"], scan["u"])
    for told in (late, early):
        np.testing.assert_array_equal(told["A"], scan["A"])
        want = selective_scan(**{name: told[name] for name in scan})
        assert np.abs(told["y"] - want).max() <= 2e-6 * max(1, np.abs(want).max())
    with pytest.raises(ToolchainError, match="2 scans have run in ExecuTorch, the program has 1"):
        ExecuTorchScanAccess(replace(artifact, order=program.scans[:1]), None).in_situ(feeds)


# ------------------------------------------------------------------------------------------------------------- int8


def rounded_graph():
    """Conv with all three rounded, a product whose output stays float, and an activation with two readers."""
    rng = np.random.default_rng(3)
    scale = {"s": np.float32(0.05), "ws": np.float32([0.01, 0.02, 0.03]), "ms": np.float32([0.02, 0.01])}
    tensors = {
        **scale,
        "z": np.uint8(120),
        "w": rng.integers(-127, 128, (3, 4, 3, 3)).astype(np.int8),
        "b": rng.integers(-900, 900, 3).astype(np.int32),
        "bs": np.float32([5e-4, 1e-3, 15e-4]),
        "m": rng.integers(-127, 128, (6, 2)).astype(np.int8),
    }
    make = helper.make_node
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["q"], name="q/QuantizeLinear"),
        make("DequantizeLinear", ["q", "s", "z"], ["d"], name="q/DequantizeLinear"),
        make("DequantizeLinear", ["w", "ws"], ["dw"], name="c/DequantizeLinear", axis=0),
        make("DequantizeLinear", ["b", "bs"], ["db"], name="c/DequantizeLinear_1", axis=0),
        make("Conv", ["d", "dw", "db"], ["c"], name="c/Conv"),
        make("Relu", ["c"], ["r"], name="c/Relu"),
        make("QuantizeLinear", ["r", "s", "z"], ["qr"], name="r/QuantizeLinear"),
        make("DequantizeLinear", ["qr", "s", "z"], ["out"], name="r/DequantizeLinear"),
        make("DequantizeLinear", ["m", "ms"], ["dm"], name="m/DequantizeLinear", axis=1),
        make("MatMul", ["d", "dm"], ["float_out"], name="m/MatMul"),
        make("DequantizeLinear", ["m", "ms"], ["dm2"], name="n/DequantizeLinear", axis=1),
        make("MatMul", ["d", "dm2"], ["n"], name="n/MatMul"),
        make("QuantizeLinear", ["n", "s", "z"], ["qn"], name="n/QuantizeLinear"),
        make("DequantizeLinear", ["qn", "s", "z"], ["rounded_out"], name="n/DequantizeLinear_1"),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, IMAGES.shape)
    outputs = [onnx.ValueInfoProto(name=name) for name in ("out", "float_out", "rounded_out")]
    initial = [numpy_helper.from_array(np.asarray(each), name) for name, each in tensors.items()]
    graph = helper.make_graph(nodes, "g", [value], outputs, initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def exactly(model, x):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})


def test_the_forms_of_int8_compute_the_same():
    model = rounded_graph()
    want = exactly(model, IMAGES)
    prepare(model)
    by_name = {node.name: node for node in model.graph.node}
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert tensors[by_name["c/Conv"].input[2]].dtype == FLOAT and by_name["n/MatMul"].op_type == "Linear"
    assert by_name["m/MatMul"].op_type == "MatMul" and tensors[by_name["m/MatMul"].input[1]].dtype == FLOAT
    assert tensors[by_name["n/DequantizeLinear"].input[0]].shape == (2, 6)
    assert "m/DequantizeLinear" not in by_name and "c/DequantizeLinear_1" not in by_name
    readers = [name for node in model.graph.node for name in node.input]
    written = [node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert all(readers.count(name) <= 1 for name in written)
    assert not any(each.dtype == np.uint8 for name, each in tensors.items() if name in readers)
    with torch.no_grad():
        have = GraphModule(model, portable=True)(torch.from_numpy(IMAGES))
    for mine, its in zip(have, want, strict=True):
        off = np.abs(mine.numpy() - its)
        assert off.max() <= 0.0501 and (off > 1e-5).mean() < 0.05  # a step, where a sum lies between two steps
    np.testing.assert_allclose(have[1].numpy(), want[1], atol=1e-5)


@pytest.mark.slow
def test_int8_layers_are_parts_of_xnnpack(tmp_path):
    need("ExecuTorch")
    model = rounded_graph()
    want = exactly(model, IMAGES)
    prepare(model)
    program = lower(model, portable=True)
    assert not [name for name in program.operators if "conv" in name or "quantize" in name], program.operators
    with ExecuTorchRuntime(written(tmp_path, program.file)) as runtime:
        have = runtime.run({"x": IMAGES})
    for mine, its in zip(have.values(), want, strict=True):
        assert np.abs(mine - its).max() <= 0.0501  # one step: XNNPACK rounds sums in another order


@pytest.mark.slow
def test_an_int8_export_has_int8_blocks_and_tests_itself(tmp_path):
    need("ExecuTorch")
    plan = ExportPlan("executorch", "int8", calib="demo", calib_images=104, smooth="off")
    made = export(CHECKPOINT, plan, tmp_path)
    accuracy, facts = made.manifest.accuracy, made.manifest.details
    assert accuracy["ok"] and accuracy["sqnr_db"] > 25 and facts["quantization"]["int8_layers"] > 10
    assert facts["operators"]["EVSSBlockInt8XProj.default"] == 2 and facts["quantization"]["size_of_fp32"] < 0.6
    assert "weight_bits" not in facts["quantization"]  # nothing saturates
    with load(made.path) as model:
        assert all(check.ok for check in model.selftest())
