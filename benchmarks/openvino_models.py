"""Compare EfficientVMamba in OpenVINO on the CPU with its graph without scans, and with RepViT-M0.9.

    python benchmarks/openvino_models.py [--variant tiny] [--imgsz 224] [--rounds 30]

One thread, batch 1, seeded weights, all in one interleaved run.

    identity   the graph in OpenVINO's own operators with every scan replaced by an identity
    plugin     the bundle of `--scan plugin`: whole EVSS blocks on the native kernel, in the extension
    scan node  the graph with only the scans in the extension, the blocks around them in OpenVINO's operators
    portable   the bundle of `--scan portable`: standard operators

All forms run in float32; plugin and identity also in bfloat16 (hint bf16). The int8 exports of both lowerings are
calibrated with generated images. RepViT-M0.9 runs in float32 and bfloat16 if its graph exists
(../shared/benchmarks/peers). The script also measures two threads, and the load time with and without a cache of
compiled models. Exit code 1 if a limit of the project is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import torch
from common import PEERS, interleave, ratio, where
from onnx import helper

from evm_deploy.bundle.bundle import Bundle
from evm_deploy.export.hub.graph import Graph, trace, with_pre_and_postprocessing
from evm_deploy.export.openvino import lowered
from evm_deploy.export.openvino.ir import convert
from evm_deploy.export.pipeline import complete, export
from evm_deploy.export.plan import ExportPlan, parse_imgsz
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import RunOptions
from evm_deploy.runtimes.openvino import OpenVinoRuntime, OpenVinoSettings
from evm_deploy.scan import onnx_function
from evm_deploy.toolchain.openvino_extension import extension, isa

MAX_PLUGIN, MAX_PORTABLE, MIN_INT8 = 1.2, 2.1, 1.4
LOADS = 15


def hub(checkpoint: Path, plan: ExportPlan) -> Graph:
    """Return the float graph that all forms are made from."""
    network = load_checkpoint(checkpoint)
    plan, preprocessing = complete(plan, network.spec)
    return trace(with_pre_and_postprocessing(network, plan, preprocessing), plan, {})


def scan_nodes(graph: Graph) -> onnx.ModelProto:
    """Return the graph with a node for each scan and no fused blocks."""
    model, _ = lowered(replace(graph, fusable={}), "plugin")
    return model


def with_identity_scans(graph: Graph) -> onnx.ModelProto:
    """Return the graph with every scan replaced by an identity of u."""
    model = scan_nodes(graph)
    for node in model.graph.node:
        if node.op_type == onnx_function.OP_TYPE:
            node.CopyFrom(helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name))
    return model


def compiled(core: Any, model: Any, hint: str = "f32", threads: int = 1) -> Any:
    """Compile a model, or a file, and return an inference request."""
    model = core.read_model(str(model)) if isinstance(model, Path) else model
    settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return core.compile_model(model, "CPU", settings).create_infer_request()


def runner(request: Any, feeds: dict[str, np.ndarray]) -> Callable[[], Any]:
    """Return a function that runs one inference."""
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)


def load_times(bundle: Bundle, cache: Path) -> dict[str, list[float]]:
    """Measure the milliseconds of loading a file, compiled anew and from the cache, in turn."""
    library = bundle.manifest.plugins
    plugin = bundle.path / next(iter(library.values())) if library else None

    times: dict[str, list[float]] = {"compiled": [], "cached": []}
    for i in range(LOADS + 1):
        for name, folder in zip(times, (None, cache), strict=True):
            options = RunOptions(1, plugin, settings=OpenVinoSettings(cache=folder))
            start = time.perf_counter()
            runtime = OpenVinoRuntime(bundle.path / "model.xml", options)
            if i:  # the first round fills the cache
                times[name].append((time.perf_counter() - start) * 1e3)
            with runtime:
                pass
    return times


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--imgsz", default="224")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    import golden

    core = ov.Core()
    core.add_extension(str(extension()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = golden.model_case(f"{args.variant}_224")["state"]
        checkpoint = folder / f"evm_{args.variant}.pth"
        torch.save({"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, checkpoint)
        plan = ExportPlan("openvino", imgsz=parse_imgsz(args.imgsz), scan="plugin")
        height, width = plan.imgsz or (0, 0)
        np.savez(folder / "images.npz", images=np.stack([synthetic_image(height, width, seed=i) for i in range(104)]))
        int8 = replace(plan, precision="int8", calib=str(folder / "images.npz"))
        bundles = {
            "plugin": export(checkpoint, plan, folder / "plugin"),
            "portable": export(checkpoint, replace(plan, scan="portable"), folder / "portable"),
            "int8 plugin": export(checkpoint, int8, folder / "plugin"),
            "int8 portable": export(checkpoint, replace(int8, scan="portable"), folder / "portable"),
        }
        graph = hub(checkpoint, plan)
        models = {key: bundle.path / "model.xml" for key, bundle in bundles.items()}
        models["scan node"] = convert(core, scan_nodes(graph))
        models["identity"] = convert(core, with_identity_scans(graph))
        feeds = {"image": np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)}
        subjects = {key: runner(compiled(core, model), feeds) for key, model in models.items()}
        for key in ("plugin", "identity"):
            subjects[f"bf16 {key}"] = runner(compiled(core, models[key], "bf16"), feeds)
        subjects["plugin, 2 threads"] = runner(compiled(core, models["plugin"], threads=2), feeds)
        if PEERS.is_dir():
            sys.path.insert(0, str(PEERS))
            import peers

            rival = core.read_model(str(peers.materialise("repvit_m0_9", folder / "repvit.onnx")))
            images = {"images": np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)}
            subjects["RepViT-M0.9"] = runner(compiled(core, rival), images)
            subjects["bf16 RepViT-M0.9"] = runner(compiled(core, rival, "bf16"), images)
        times = interleave(subjects, args.rounds)
        loads = {key: load_times(bundles[key], folder / "cache" / key) for key in ("plugin", "portable")}
        sizes = {key: bundle.size_bytes for key, bundle in bundles.items()}
    print(f"{where()}, OpenVINO {ov.__version__.split('-')[0]}, 1 thread")
    print(f"EfficientVMamba {args.variant}, {height}x{width}, {args.rounds} rounds, kernel {isa(extension())}")
    medians = {}
    for key in subjects:
        medians[key], text = ratio(times, key, "identity")
        print(f"{key:<18} / identity   {text}  median {statistics.median(times[key]):.1f} ms")
    faster = {}
    for key in ("plugin", "portable"):
        faster[key], text = ratio(times, key, f"int8 {key}")
        print(f"{key} float32 / int8   {text}  files {sizes[f'int8 {key}'] / sizes[key]:.3f} of float32's")
    for slow, fast in (("plugin", "bf16 plugin"), ("plugin", "RepViT-M0.9"), ("bf16 plugin", "bf16 RepViT-M0.9")):
        if fast in times:
            print(f"{slow} / {fast}   {ratio(times, slow, fast)[1]}")
    print(f"plugin, 2 threads / 1    {ratio(times, 'plugin, 2 threads', 'plugin')[1]}")
    for key, seen in loads.items():
        medians_of = ", ".join(f"{name} {statistics.median(values):.0f} ms" for name, values in seen.items())
        print(f"load {key:<12} compiled / cached   {ratio(seen, 'compiled', 'cached')[1]}  {medians_of}")
    return int(medians["plugin"] > MAX_PLUGIN or medians["portable"] > MAX_PORTABLE or faster["plugin"] < MIN_INT8)


if __name__ == "__main__":
    sys.exit(main())
