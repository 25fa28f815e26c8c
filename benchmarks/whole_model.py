"""Compare EfficientVMamba with native kernels and portable scans, its graph without scans, and RepViT-M0.9.

    python benchmarks/whole_model.py [--variant tiny] [--imgsz 224] [--rounds 30]

One thread, float32, batch 1, seeded weights.

    identity   the graph in ONNX Runtime's own operators with every scan replaced by an identity
    native     the bundle's file with the library registered: whole EVSS blocks on the native kernel
    scan node  the graph with only the scans on the native kernel, the blocks around them in ONNX Runtime's operators
    portable   the bundle's file without the library

RepViT-M0.9, a network with about as many MACs as T, is measured too if its graph exists (../shared/benchmarks/peers).
The script also prints the operator executions of one portable inference (every iteration of a loop is counted), the
load time, and the memory of loading and inference. Exit code 1 if a limit of the project is missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from common import PEERS, interleave, ratio, where
from onnx import helper

from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import QUANTIZED, ExportPlan, parse_imgsz
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.scan import onnx_function
from evm_deploy.toolchain.plugins import find_plugin, kernel_isa

MAX_PORTABLE, MAX_EXECUTIONS, MAX_LOAD_S = 2.2, 25_000, 1.0
MAX_NATIVE, MAX_TO_PEER = 1.12, 1.35


def with_scan_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same graph with fused blocks expanded; each scan stays one node."""
    scan = [(onnx_function.DOMAIN, onnx_function.OP_TYPE)]
    return onnx.inliner.inline_selected_functions(model, scan, exclude=True)


def with_identity_scans(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same graph with every scan replaced by an identity of u."""
    copy = with_scan_nodes(model)
    for node in copy.graph.node:
        if node.op_type == onnx_function.OP_TYPE:
            node.CopyFrom(helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name))
    del copy.functions[:]
    return copy


def session(model: onnx.ModelProto, profile: str = "", plugin: Path | None = None) -> ort.InferenceSession:
    """Open a model in ONNX Runtime with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if plugin:
        options.register_custom_ops_library(str(plugin))
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def executions(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> int:
    """Count the kernels that one inference executes, with ONNX Runtime's profiler."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(model, str(Path(folder) / "profile"))
        profiled.run(None, feeds)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    return sum(1 for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"))


INFERENCES = """
import sys, numpy, onnxruntime
def peak():  # peak memory of this program; ru_maxrss would start from the parent's peak
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
path, height, width, plugin = sys.argv[1:]
before, options = peak(), onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if plugin:
    options.register_custom_ops_library(plugin)
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
for _ in range(10):
    session.run(None, {"image": numpy.zeros((1, int(height), int(width), 3), numpy.uint8)})
print(peak() - before)
"""


def inference_memory(path: Path, size: tuple[int, int], plugin: Path | None) -> float:
    """Measure the peak resident memory in MB of loading `path` and ten inferences, beyond an imported onnxruntime."""
    command = [sys.executable, "-c", INFERENCES, str(path), *map(str, size), str(plugin or "")]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peer(folder: Path) -> ort.InferenceSession | None:
    """Return RepViT-M0.9 with random weights, or None if its graph does not exist."""
    if not PEERS.is_dir():
        return None
    sys.path.insert(0, str(PEERS))
    import peers

    return session(onnx.load(str(peers.materialise("repvit_m0_9", folder / "repvit.onnx"))))


def quantized_plan(folder: Path, float32: ExportPlan, precision: str) -> ExportPlan:
    """Return the plan of `float32` in int8 or w8, with images, whose content does not matter to the time."""
    assert float32.imgsz
    height, width = float32.imgsz
    images = np.stack([synthetic_image(height, width, seed=i) for i in range(104)])
    np.savez(folder / "images.npz", images=images)
    return replace(float32, precision=precision, calib=str(folder / "images.npz"))


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--imgsz", default="224")
    parser.add_argument("--rounds", type=int, default=30)
    for precision in QUANTIZED:
        text = f"also measure the {precision} export, calibrated or evaluated with generated images"
        parser.add_argument(f"--{precision}", dest="others", action="append_const", const=precision, help=text)
    args = parser.parse_args()
    import golden

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = golden.model_case(f"{args.variant}_224")["state"]
        checkpoint = folder / f"evm_{args.variant}.pth"
        torch.save({"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, checkpoint)
        start = time.perf_counter()
        plan = ExportPlan("onnx", imgsz=parse_imgsz(args.imgsz))
        bundle = export(checkpoint, plan, folder)
        export_s = time.perf_counter() - start
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        file = bundle.path / "model.onnx"
        model = onnx.load(str(file))
        height, width = bundle.manifest.preprocessing["size"]
        feeds = {"image": np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)}
        start = time.perf_counter()
        runners = {"portable": session(model)}
        load_s = time.perf_counter() - start
        runners["identity"] = session(with_identity_scans(model))
        plugin = find_plugin("onnxruntime")
        if plugin:
            runners["native"] = session(model, plugin=plugin)
            runners["scan node"] = session(with_scan_nodes(model), plugin=plugin)
        others = {name: export(checkpoint, quantized_plan(folder, plan, name), folder) for name in args.others or ()}
        for name, other in others.items():
            runners[name] = session(onnx.load(str(other.path / "model.onnx")), plugin=plugin)
        shares = {name: other.size_bytes / bundle.size_bytes for name, other in others.items()}
        subjects = {key: lambda runner=runner: runner.run(None, feeds) for key, runner in runners.items()}
        if rival := peer(folder):
            images = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
            subjects["RepViT-M0.9"] = lambda: rival.run(None, {"images": images})
        times = interleave(subjects, args.rounds)
        modes = {"portable": None, **({"native": plugin} if plugin else {})}
        memory = {mode: inference_memory(file, (height, width), library) for mode, library in modes.items()}
    count = executions(model, feeds)
    print(f"{where()}, onnxruntime {ort.__version__}, 1 thread")
    print(f"EfficientVMamba {args.variant}, {height}x{width}, float32, {args.rounds} rounds")
    print(f"native kernel             {kernel_isa(plugin) if plugin else 'not built'}")
    medians = {}
    for name in subjects:
        medians[name], text = ratio(times, name, "identity")
        print(f"{name:<12} / identity   {text}  median {statistics.median(times[name]):.1f} ms")
    failed = medians["portable"] > MAX_PORTABLE or count > MAX_EXECUTIONS or load_s > MAX_LOAD_S
    if "native" in subjects:
        failed |= medians["native"] > MAX_NATIVE
    if rival and "native" in subjects:
        to_peer, text = ratio(times, "native", "RepViT-M0.9")
        print(f"native / RepViT-M0.9      {text}")
        failed |= (args.variant, height, width) == ("tiny", 224, 224) and to_peer > MAX_TO_PEER
    for name, share in shares.items():
        _, text = ratio(times, "native", name)
        print(f"native float32 / {name:<4}     {text}  file {share:.3f} of float32's")
    print(f"operator executions       {count}")
    print(f"load                      {load_s:.2f} s")
    print("memory of an inference    " + ", ".join(f"{mode} {mb:.0f} MB" for mode, mb in memory.items()))
    print(f"export, verified          {export_s:.1f} s, peak {peak_mb:.0f} MB")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
