"""Compare EfficientVMamba in float32 and INT8 with networks of about its size: latency, two threads, throughput.

    python benchmarks/rivals.py [--variant tiny] [--runtime onnxruntime] [--rounds 30] [--cpu-time] [--throughput]
    python benchmarks/rivals.py --runtime openvino --isa avx2
    python benchmarks/rivals.py --weight-bits 7

224x224, seeded weights, generated images. The networks are RepViT-M0.9, FastViT-T8 and MobileNetV2-1.4
(../shared/benchmarks/peers). ONNX Runtime's own static quantisation makes their INT8 files, as its documentation says:
QDQ, INT8 weights by channel, uint8 activations, every operator. OpenVINO reads the same files. The files of
EfficientVMamba come from `evm-export --int8`.

Batch 1 runs on one thread and on two, all networks in turn. --cpu-time measures one thread alone, by the CPU time of
the process, which other work on the machine disturbs less. --throughput measures batch 8 on all cores, and as many
streams of batch 1 as there are cores, in images a second. --isa limits OpenVINO's instructions and ours, in float32:
OpenVINO chooses the layers of INT8 by the CPU, not by that limit. --weight-bits 7 is for CPUs without VNNI, where ONNX
Runtime asks for reduce_range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import torch
from common import PEERS, interleave, ratio, where
from onnx import numpy_helper
from onnxruntime import quantization

from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.runtimes.base import Batch
from evm_deploy.toolchain.openvino_extension import extension
from evm_deploy.toolchain.plugins import find_plugin, kernel_isa

SIZE, IMAGES, BATCH, SECONDS = 224, 104, 8, 3.0
RIVALS = {"repvit_m0_9": "RepViT-M0.9", "fastvit_t8": "FastViT-T8", "mobilenetv2_140": "MobileNetV2-1.4"}
SCANS, FILES = {"onnx": "auto", "openvino": "plugin"}, {"onnx": "model.onnx", "openvino": "model.xml"}
QUANTIZED = {
    "per_channel": True,
    "activation_type": quantization.QuantType.QUInt8,
}  # with INT8 activations few layers fuse
CORES = len(os.sched_getaffinity(0))
Run = Callable[[], Any]


class RandomImages(quantization.CalibrationDataReader):
    """Give normalised random images to ONNX Runtime's calibration; their values do not matter to the time."""

    def __init__(self) -> None:
        self.images = iter(np.random.default_rng(0).standard_normal((4, 1, 3, SIZE, SIZE), np.float32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"images": image}


def with_any_batch(file: Path) -> None:
    """Change the graph of a rival in place: it takes any number of images."""
    model = onnx.load(str(file))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    reshapes = [node for node in model.graph.node if node.op_type == "Reshape"]
    for node in reshapes:
        del node.attribute[:]  # allowzero: a 0 then is no size of the input
    shapes = {node.input[1] for node in reshapes}
    for tensor in model.graph.initializer:
        if tensor.name in shapes:
            shape = numpy_helper.to_array(tensor).copy()
            shape[0] = 0  # as the input's
            tensor.CopyFrom(numpy_helper.from_array(shape, tensor.name))
    onnx.save(model, str(file))


def rivals(folder: Path, weight_bits: int) -> Iterator[tuple[str, Path]]:
    """Write each rival in float32 and INT8; yield name and file."""
    if not PEERS.is_dir():
        return
    sys.path.insert(0, str(PEERS))
    import peers

    for key, name in RIVALS.items():
        float32 = peers.materialise(key, folder / f"{key}.onnx")
        with_any_batch(float32)
        prepared, int8 = folder / f"{key}-prepared.onnx", folder / f"{key}-int8.onnx"
        quantization.quant_pre_process(str(float32), str(prepared))
        quantization.quantize_static(
            str(prepared), str(int8), RandomImages(), reduce_range=weight_bits == 7, **QUANTIZED
        )
        yield name, float32
        yield f"{name} int8", int8


def ours(variant: str, target: str, folder: Path, int8: bool, weight_bits: int) -> Iterator[tuple[str, Path]]:
    """Export EfficientVMamba in float32 and, if asked, in INT8, of any batch; yield name and file."""
    import golden

    state = golden.model_case(f"{variant}_224")["state"]
    checkpoint, images = folder / f"{variant}.pth", folder / "images.npz"
    torch.save({"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, checkpoint)
    np.savez(images, images=np.stack([synthetic_image(SIZE, SIZE, seed=i) for i in range(IMAGES)]))
    float32 = ExportPlan(target, imgsz=(SIZE, SIZE), batch=Batch(1, 1, BATCH), scan=SCANS[target])
    quantized = replace(float32, precision="int8", calib=str(images), weight_bits=weight_bits)
    for name, plan in ((variant, float32), (f"{variant} int8", quantized))[: 1 + int8]:
        yield name, export(checkpoint, plan, folder).path / FILES[target]


def feeds_of(name: str, batch: int) -> dict[str, np.ndarray]:
    """Return the input of a network: uint8 images for ours, normalised images for rivals."""
    g = np.random.default_rng(0)
    if name.split()[0] in RIVALS.values():
        return {"images": g.standard_normal((batch, 3, SIZE, SIZE), np.float32)}
    return {"image": g.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)}


def in_onnxruntime(file: Path, name: str, threads: int, batch: int) -> Run:
    """Return a function that runs one inference in ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle sessions leave the cores to the others
    feeds = feeds_of(name, batch)
    if "image" in feeds:
        options.register_custom_ops_library(str(find_plugin("onnxruntime")))
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def in_openvino(core: Any, file: Path, name: str, threads: int, batch: int, streams: int = 1) -> Run:
    """Return a function that runs one inference in OpenVINO, or `streams` inferences at a time."""
    feeds = feeds_of(name, batch)
    model = core.read_model(str(file))
    model.reshape({key: value.shape for key, value in feeds.items()})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
    compiled = core.compile_model(model, "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(streams)]
    if streams == 1:
        return lambda: requests[0].infer(feeds, share_inputs=True, share_outputs=True)

    def run() -> None:
        for request in requests:
            request.start_async(feeds)
        for request in requests:
            request.wait()

    return run


def images_a_second(run: Run, images: int) -> float:
    """Measure the images a second of SECONDS of inferences, after two untimed ones."""
    run(), run()
    count, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < SECONDS:
        run()
        count += 1
    return count * images / took


def in_streams(runs: list[Run]) -> Run:
    """Return a function that runs several inferences, each in a thread of its own."""
    pool = ThreadPoolExecutor(len(runs))
    return lambda: [future.result() for future in [pool.submit(run) for run in runs]]


def print_latencies(times: dict[str, list[float]], ours: list[str], rivals: list[str]) -> None:
    """Print medians, and the ratio of each of our files to each rival of the same precision."""
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=10)
        print(f"{name:<32} {statistics.median(values):6.1f} ms  (10-90 %: {low:.1f}-{high:.1f})")
    for mine in ours:
        for rival in rivals:
            if mine.endswith("int8") == rival.endswith("int8"):
                print(f"{mine} / {rival:<24} {ratio(times, mine, rival)[1]}")
    if len(ours) == 2:
        print(f"{ours[0]} float32 / int8         {ratio(times, *ours)[1]}")


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--runtime", default="onnxruntime", choices=("onnxruntime", "openvino"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true", help="measure one thread alone, by CPU time")
    parser.add_argument("--throughput", action="store_true", help="also measure batch 8 and streams")
    parser.add_argument("--isa", choices=("avx2",), help="float32, without newer instructions, in OpenVINO and in ours")
    parser.add_argument("--weight-bits", type=int, choices=(7, 8), default=8, help="of INT8")
    args = parser.parse_args()
    if args.isa:
        if args.runtime != "openvino":
            parser.error("--isa: ONNX Runtime cannot be told which instructions to use; add --runtime openvino")
        os.environ |= {"EVM_ISA": args.isa, "ONEDNN_MAX_CPU_ISA": args.isa.upper()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.runtime == "onnxruntime":
            target, version, isa = "onnx", ort.__version__, kernel_isa(find_plugin("onnxruntime"))
            make = in_onnxruntime

            def streams_of(file: Path, name: str) -> Run:
                return in_streams([in_onnxruntime(file, name, 1, 1) for _ in range(CORES)])

        else:
            target, version, isa = "openvino", ov.__version__.split("-")[0], kernel_isa(extension())
            core = ov.Core()
            core.add_extension(str(extension()))

            make = partial(in_openvino, core)

            def streams_of(file: Path, name: str) -> Run:
                return in_openvino(core, file, name, CORES, 1, streams=CORES)

        files = dict(ours(args.variant, target, folder, not args.isa, args.weight_bits))
        mine = list(files)
        files.update(rivals(folder, args.weight_bits))
        if args.isa:
            files = {name: file for name, file in files.items() if not name.endswith("int8")}
        others = [key for key in files if key not in mine]
        print(f"{where()}, {args.runtime} {version}, kernel {isa}, {SIZE}x{SIZE}, {args.rounds} rounds")
        print("one thread" + (", CPU time of the process" if args.cpu_time else ""))
        clock = time.process_time if args.cpu_time else time.perf_counter
        print_latencies(
            interleave({k: make(f, k, 1, 1) for k, f in files.items()}, args.rounds, clock=clock), mine, others
        )
        if not args.cpu_time:
            print("two threads / one")
            one = {k: make(f, k, 1, 1) for k, f in files.items()}
            two = {f"{k}, 2 threads": make(f, k, 2, 1) for k, f in files.items()}
            times = interleave(one | two, args.rounds)
            for key in files:
                print(f"{key:<24} {ratio(times, f'{key}, 2 threads', key)[1]}")
        if args.throughput:
            print(f"images a second: batch {BATCH} on {CORES} threads; {CORES} streams of batch 1")
            for key, file in files.items():
                batch = images_a_second(make(file, key, CORES, BATCH), BATCH)
                streams = streams_of(file, key)
                print(f"{key:<24} {batch:6.1f}   {images_a_second(streams, CORES):6.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
