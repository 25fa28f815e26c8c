"""EfficientVMamba with portable scans and with the native scan, against the same graph with scans replaced by identity.

    python benchmarks/whole_model.py [--variant tiny] [--imgsz 224] [--rounds 30]

One thread, float32, batch 1, seeded weights. All run in turn, round by round, so that a drifting machine hits
all; ratios are taken round by round. Also printed: operator executions of one inference (loops unrolled by counting),
load time and peak memory. Exit 1 when a limit of the project is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "golden"))
import golden

from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan, parse_imgsz
from evm_deploy.plugins import find_plugin, kernel_isa
from evm_deploy.scan import onnx_function

MAX_RATIO, MAX_EXECUTIONS, MAX_LOAD_S = 2.2, 25_000, 1.0


def with_identity_scans(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, every scan passing u through."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == onnx_function.OP_TYPE:
            node.CopyFrom(helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name))
    del copy.functions[:]
    return copy


def session(model: onnx.ModelProto, profile: str = "", plugin: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if plugin:
        options.register_custom_ops_library(str(plugin))
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def executions(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> int:
    """Kernels executed in one inference, as ONNX Runtime's profiler counts them."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(model, str(Path(folder) / "profile"))
        profiled.run(None, feeds)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    return sum(1 for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"))


def milliseconds(runner: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    start = time.perf_counter()
    runner.run(None, feeds)
    return (time.perf_counter() - start) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--imgsz", default="224")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        state = golden.model_case(f"{args.variant}_224")["state"]
        checkpoint = Path(folder) / f"evm_{args.variant}.pth"
        torch.save({"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, checkpoint)
        start = time.perf_counter()
        bundle = export(checkpoint, ExportPlan("onnx", imgsz=parse_imgsz(args.imgsz)), folder)
        export_s = time.perf_counter() - start
        model = onnx.load(str(bundle.path / "model.onnx"))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    height, width = bundle.manifest.preprocessing["size"]
    feeds = {"image": np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)}
    start = time.perf_counter()
    runners = {"portable": session(model)}
    load_s = time.perf_counter() - start
    runners["identity"] = session(with_identity_scans(model))
    plugin = find_plugin("onnxruntime")
    if plugin:
        runners["plugin"] = session(model, plugin=plugin)
    for _ in range(5):  # warm-up
        for runner in runners.values():
            milliseconds(runner, feeds)
    rounds = [{name: milliseconds(runner, feeds) for name, runner in runners.items()} for _ in range(args.rounds)]
    count, ratio = executions(model, feeds), {}
    print(f"{datetime.date.today()}  {platform.machine()}  {_cpu()}  onnxruntime {ort.__version__}, 1 thread")
    print(f"EfficientVMamba {args.variant}, {height}x{width}, float32, {args.rounds} rounds")
    print(f"native kernel             {kernel_isa(plugin) if plugin else 'not built'}")
    for name in runners:
        ratios = sorted(times[name] / times["identity"] for times in rounds)
        ratio[name] = statistics.median(ratios)
        low, high = ratios[len(ratios) // 10], ratios[-len(ratios) // 10 - 1]
        ms = statistics.median(times[name] for times in rounds)
        print(f"{name:<10} / identity     {ratio[name]:.2f}  (10-90 %: {low:.2f}-{high:.2f})  median {ms:.1f} ms")
    print(f"operator executions       {count}")
    print(f"load                      {load_s:.2f} s")
    print(f"export, verified          {export_s:.1f} s, peak {peak_mb:.0f} MB")
    return 0 if ratio["portable"] <= MAX_RATIO and count <= MAX_EXECUTIONS and load_s <= MAX_LOAD_S else 1


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
