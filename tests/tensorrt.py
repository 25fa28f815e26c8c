"""Helpers of TensorRT's tests and benchmarks: networks and scans as ONNX, and engines of TensorRT-RTX."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from evm_deploy.calib.histogram import Range
from evm_deploy.calib.int8 import candidates
from evm_deploy.calib.layers import activations
from evm_deploy.calib.quantize import insert_qdq
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.tensorrt.graph import tensorrt_graph
from evm_deploy.export.tensorrt.settings import EngineSettings
from evm_deploy.model.efficientvmamba.checkpoint import KEEP_FLOAT, WEIGHT_ONLY
from evm_deploy.runtimes.tensorrt import build_engine
from evm_deploy.scan.unrolled import unrolled_scan
from tests import openvino


def network(graph, plan):
    """A traced network as TensorRT takes it, and the names of its int8 layers. Ranges are made up: no numerics."""
    hub, names = graph.model, []
    if plan.precision.startswith("int8"):
        found = candidates(hub, "int8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY)
        hub = insert_qdq(hub, found, dict.fromkeys(activations(found).values(), Range(-4.0, 4.0)), symmetric=True)
        names = [layer.node for layer in found if not layer.weight_only]
    model, _ = tensorrt_graph(hub, plan)
    return model, names


def traced(checkpoint, imgsz, target="trt-rtx", **changes):
    """Hub graph and plan of a checkpoint; `changes`: of the plan."""
    return openvino.traced(checkpoint, replace(ExportPlan(target, precision="fp32", imgsz=imgsz), **changes))


def scan_model(b, K, L, D, N, steps=None):
    """One unrolled scan on seven inputs; b "batch" for a dynamic one."""
    shapes = {
        "u": (b, K, L, D), "delta": (b, K, L, D), "A": (K, D, N), "B": (b, K, L, N), "C": (b, K, L, N), "skip": (K, D),
        "bias": (K, D),
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["u"])
    nodes = unrolled_scan({name: name for name in shapes}, "y", L, "scan/", steps, six_axes=True)
    model = helper.make_model(
        helper.make_graph(nodes, "scan", inputs, [output]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def engine(model, folder: Path, profile=None, **settings):
    """Build `model` with TensorRT-RTX in a process of its own. Returns that process; the files are in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    chosen = asdict(EngineSettings(**{"sms": (86,), **settings}))
    del chosen["defer"], chosen["efficient_nms"]
    (folder / "build.json").write_text(
        json.dumps({"target": "trt-rtx", "scan": "portable", "profile": profile, **chosen})
    )
    scan = {"value": "portable", "nodes": []}
    manifest = {"target": "trt-rtx", "scan": scan, "files": {}, "details": {}, "artifact": "model.onnx", "built": False}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return subprocess.run([sys.executable, build_engine.__file__, folder], capture_output=True, text=True)
