"""Ready-made ONNX files with scan nodes of others, in the place of a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from evm_deploy import cli, load
from evm_deploy.calib.layers import quantizable_layers
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.hub.graph import trace
from evm_deploy.export.pipeline import complete
from evm_deploy.export.source import Source
from evm_deploy.model.foreign.ready import ready_network
from evm_deploy.model.graph_file import GraphFile

WIDTH, STATES, GROUPS, SIDE = 8, 4, 2, 8
LENGTH = SIDE * SIDE // 4


def file_of(
    path,
    domain="com.depthart",
    kind="SelectiveScan",
    batch=1,
    size=SIDE,
    groups=GROUPS,
    softplus=1,
    optional=True,
    **more,
):
    """Write a network of two scans as the legacy exporter of torch names it, at opset 17. Returns the path."""
    rng = np.random.default_rng(0)
    constants = {}

    def const(name, *shape, scale=1.0):
        constants[name] = (scale * rng.standard_normal(shape) / max(1, np.prod(shape[1:])) ** 0.5).astype(np.float32)
        return name

    def shape(name, *dims):
        constants[name] = np.array(dims, np.int64)
        return name

    nodes, x = [], "image"
    node = helper.make_node
    nodes.append(
        node("Conv", [x, const("stem.w", WIDTH, 3, 2, 2), const("stem.b", WIDTH)], ["t0"], "/stem/Conv", strides=[2, 2])
    )
    nodes.append(node("Reshape", ["t0", shape("flat", 0, WIDTH, -1)], ["u0"], "/Reshape"))
    for i in range(2):
        at = f"/blocks.{i}/op"
        u, n = f"u{i}", groups * STATES
        nodes += [
            node("Conv", [u, const(f"x{i}", 2 * n, WIDTH, 1, scale=0.5)], [f"bc{i}"], f"{at}/x_proj/Conv"),
            node("Split", [f"bc{i}", shape(f"halves{i}", n, n)], [f"b{i}", f"c{i}"], f"{at}/Split", axis=1),
            node("Conv", [u, const(f"dt{i}", WIDTH, WIDTH, 1, scale=0.3)], [f"d{i}"], f"{at}/dt_proj/Conv"),
            node("Softplus" if not softplus else "Identity", [f"d{i}"], [f"delta{i}"], f"{at}/Soft"),
            node("Exp", [const(f"A_log{i}", WIDTH, STATES, scale=0.5)], [f"e{i}"], f"{at}/Exp"),
            node("Neg", [f"e{i}"], [f"A{i}"], f"{at}/Neg"),
        ]
        B, C = f"b{i}", f"c{i}"
        if groups > 1:
            grouped = shape(f"g{i}", 0, groups, STATES, -1)
            nodes += [node("Reshape", [part, grouped], [f"{part}g"], f"{at}/Group{part}") for part in (B, C)]
            B, C = f"{B}g", f"{C}g"
        rest = [const(f"D{i}", WIDTH, scale=0.1), const(f"bias{i}", WIDTH)] if optional else []
        attributes = {"delta_softplus": softplus} if softplus is not None else {}
        reads = [u, f"delta{i}", f"A{i}", B, C, *rest]
        nodes.append(node(kind, reads, [f"y{i}"], f"{at}/{kind}", domain=domain, **attributes, **more))
        nodes.append(node("Conv", [f"y{i}", const(f"out{i}", WIDTH, WIDTH, 1)], [f"o{i}"], f"{at}/out_proj/Conv"))
        nodes.append(node("Add", [f"o{i}", u], [f"u{i + 1}"], f"/blocks.{i}/Add"))
    nodes += [
        node("ReduceMean", ["u2"], ["pooled"], "/ReduceMean", axes=[2], keepdims=0),
        node("Gemm", ["pooled", const("head.w", WIDTH, 5), const("head.b", 5)], ["scores"], "/head/Gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "someones",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return str(path)


@pytest.mark.parametrize(
    ("target", "scan"),
    [
        *(("onnx", "auto"), ("onnx", "portable"), ("openvino", "auto"), ("openvino", "portable"), ("trt", "auto")),
        ("litert", "auto"),
    ],
)
def test_the_scans_become_ours_on_every_target_of_the_hub_graph(target, scan, tmp_path):
    file = GraphFile(file_of(tmp_path / "depth.onnx", out_float=1))
    manifest = export(file, ExportPlan(target, "fp32", scan=scan), tmp_path / "dist").manifest
    assert manifest.parity["ok"] and {each["name"] for each in manifest.parity["scans"]} == {
        "blocks.0.op",
        "blocks.1.op",
    }
    assert min(each["share"] for each in manifest.parity["scans"]) > 0.1 and manifest.outputs[0]["name"] == "logits"
    assert list(manifest.model["blocks"]) == ["blocks.0", "blocks.1"]
    assert manifest.model["checkpoint"]["file"] == "depth.onnx" and manifest.name == f"depth-{target}-fp32"


def slow(u, delta, A, B, C, D, bias, softplus):
    """The recurrence as the kernels state it, one channel, one step at a time."""
    y, group = np.zeros_like(u), u.shape[1] // B.shape[1]
    for b, d in np.ndindex(u.shape[:2]):
        h = np.zeros(A.shape[1])
        for t in range(u.shape[2]):
            dt = delta[b, d, t] + bias[d]
            dt = np.log1p(np.exp(dt)) if softplus else dt
            h = np.exp(dt * A[d]) * h + dt * u[b, d, t] * B[b, d // group, :, t]
            y[b, d, t] = h @ C[b, d // group, :, t] + D[d] * u[b, d, t]
    return y


@pytest.mark.parametrize(("groups", "softplus", "optional"), [(1, 1, True), (2, 0, False), (2, 1, True)])
def test_the_float_model_is_the_file_s_own_recurrence(groups, softplus, optional, tmp_path):
    """Groups of rank 3 and 4, with and without softplus, D and bias: against numpy by hand."""
    path = file_of(tmp_path / "net.onnx", "my.ops", "Scan", groups=groups, softplus=softplus, optional=optional)
    module = ready_network(GraphFile(path, "my.ops::Scan")).module
    x = np.random.default_rng(1).standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)
    w = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in onnx.load(path).graph.initializer}
    with torch.no_grad():
        have = module(torch.from_numpy(x))["logits"].numpy()
    patches = x.reshape(2, 3, SIDE // 2, 2, SIDE // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(2, -1, 12)
    u = (patches @ w["stem.w"].reshape(WIDTH, 12).T + w["stem.b"]).transpose(0, 2, 1)
    for i in range(2):
        B, C = np.split(np.einsum("oc,bcl->bol", w[f"x{i}"][..., 0], u), 2, 1)
        delta = np.einsum("oc,bcl->bol", w[f"dt{i}"][..., 0], u)
        delta = delta if softplus else np.log1p(np.exp(delta))
        B, C = (part.reshape(2, groups, STATES, -1) for part in (B, C))
        D, bias = (w[f"D{i}"], w[f"bias{i}"]) if optional else (np.zeros(WIDTH), np.zeros(WIDTH))
        y = slow(u, delta, -np.exp(w[f"A_log{i}"]), B, C, D, bias, softplus)
        u = u + np.einsum("oc,bcl->bol", w[f"out{i}"][..., 0], y)
    want = u.mean(2) @ w["head.w"] + w["head.b"]
    assert np.abs(have - want).max() <= 1e-5 * np.abs(want).max()


def test_from_the_command_line_with_an_operator_of_ones_own(tmp_path, capsys):
    path = file_of(tmp_path / "net.ONNX", "my.ops", "Scan", batch="n", size="side")
    flags = [path, "--target", "onnx", "-q", "-o", str(tmp_path), "--imgsz", "16", "--batch", "dynamic", "--json"]
    assert cli.export_main(flags) == 2
    assert "is my.ops::Scan, which is not known here" in capsys.readouterr().err
    more = ["--scan-op", "my.ops::Scan", "--task", "classification", "--head", "probs"]
    assert cli.export_main([*flags, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["manifest"]["model"]["num_classes"] == 5 and found["manifest"]["outputs"][0]["name"] == "probs"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    with load(found["bundle"]) as model:
        assert all(check.ok for check in model.selftest())
        have = model.run({"image": pixels})["probs"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    module = ready_network(GraphFile(path, "my.ops::Scan"), (16, 16)).module
    want = module(x)["logits"].softmax(-1).numpy()
    assert np.abs(have - want).max() < 1e-5


def test_a_target_that_starts_from_torch_is_refused_by_name(tmp_path):
    source = Source(GraphFile(file_of(tmp_path / "net.onnx")))
    with pytest.raises(
        UsageError, match=r"target 'coreml' is traced from a torch module, and net.onnx is a ready-made"
    ):
        export(source, ExportPlan("coreml", "fp32"), tmp_path)


def test_a_wrong_rewrite_is_noticed(tmp_path, monkeypatch):
    """Negative control: the file's scan has no softplus, and ours computes it."""
    from evm_deploy.export.hub import ready

    original = ready._scan_nodes

    def spoilt(node, *sizes):
        nodes = original(node, *sizes)
        for each in nodes:
            del each.attribute[len(each.attribute) if each.op_type != "SelectiveScan" else 0 :]
        return nodes

    monkeypatch.setattr(ready, "_scan_nodes", spoilt)
    with pytest.raises(EvmError, match="differs from the float model"):
        export(GraphFile(file_of(tmp_path / "net.onnx", softplus=0)), ExportPlan("onnx", "fp32"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "plan", "message"),
    [
        ({"softplus": None}, {}, "has no attribute delta_softplus"),
        ({}, {"imgsz": (16, 16)}, "takes images of 8x8"),
        ({}, {"input": "tensor", "batch": "4"}, "the graph takes a batch of 1"),
        ({"kind": "Other"}, {}, "is com.depthart::Other, which is not known here"),
    ],
)
def test_what_cannot_be_taken_is_said(changes, plan, message, tmp_path):
    file = GraphFile(file_of(tmp_path / "net.onnx", **changes))
    with pytest.raises(UsageError, match=message):
        export(file, ExportPlan("onnx", "fp32", **plan), tmp_path)


def test_files_that_are_no_networks_of_images(tmp_path):
    with pytest.raises(EvmError, match=r"absent.onnx does not exist"):
        GraphFile(str(tmp_path / "absent.onnx"))
    broken = tmp_path / "broken.onnx"
    for content in (b"", b"PK\3\4 no protobuf", b"\0" * 64):
        broken.write_bytes(content)
        with pytest.raises(EvmError, match="cannot be read as an ONNX file"):
            ready_network(GraphFile(str(broken)))
    model = onnx.load(file_of(tmp_path / "net.onnx"))
    for operator in ("Scan", "::Scan", "my.ops::"):
        with pytest.raises(UsageError, match="names no operator"):
            GraphFile(str(tmp_path / "net.onnx"), operator)
    model.graph.input.append(helper.make_tensor_value_info("K", TensorProto.FLOAT, [3, 3]))
    onnx.save(model, broken)
    with pytest.raises(UsageError, match=r"the inputs image \[1, 3, 8, 8\], K \[3, 3\]: an artifact takes one"):
        ready_network(GraphFile(str(broken)))


def test_int8_layers_of_a_ready_made_file(tmp_path):
    """Layers beside the scans stay in float by default; the stem, which writes the first u, is one of them."""
    source = Source(GraphFile(file_of(tmp_path / "net.onnx")))
    plan, preprocessing = complete(ExportPlan("onnx", "fp32"), source.network(ExportPlan("onnx")).spec)
    model = trace(source.reference(plan, preprocessing), plan, {}).model
    assert [layer.module for layer in quantizable_layers(model, float_around_scans=True)] == ["head"]
    every = [layer.module for layer in quantizable_layers(model)]
    assert every == ["stem", "blocks.0.op.out_proj", "blocks.1.op.out_proj", "head"]
