"""Check that times by layer add up to the model's latency, and that the scans' share equals the time saved by removal.

    python benchmarks/layers.py [CHECKPOINT] [--imgsz 224] [--rounds 40]

ONNX Runtime and OpenVINO, one thread, with portable scans and with blocks on the native kernel. The model and a copy
without scans are timed in turn. In the copy, portable scans are replaced by u + delta + mean(B) + mean(C), so that all
layers before them are still computed; blocks run on a library compiled without the recurrence, which returns y = u. Of
five profiles the script uses the one with the middle sum. Exit code 1 if the sum is not 85-105 % of the median latency,
or if the shares differ by more than 5 points.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import interleave, where

from evm_deploy.bench.layers import measure_layers
from evm_deploy.bench.measurable import examples
from evm_deploy.bundle.loaded import LoadedBundle, load
from evm_deploy.demo import CHECKPOINT
from evm_deploy.export.hub.graph import trace, with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete, export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.targets import get_target
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import RunOptions
from evm_deploy.scan import onnx_function
from evm_deploy.toolchain.compile import read_recipe

SUM, POINTS = (0.85, 1.05), 0.05
TIMES = 5
CALL = "    scan_channels(rows, channels);\n"
CASES = [(target, scan) for target in ("onnx", "openvino") for scan in ("portable", "plugin")]


def no_scan(opset: int, block_steps: int = 0, softplus: bool = True) -> Any:
    """Return a function for evm::SelectiveScan that reads all inputs and costs almost nothing."""
    from onnx import helper

    f = onnx_function.Body("SelectiveScan/")
    means = [f.op("ReduceMean", tensor, f.const([-1]), keepdims=1) for tensor in ("B", "C")]
    f.write("Add", [f.op("Add", f.op("Add", "u", "delta"), means[0]), means[1]], onnx_function.OUTPUT)
    return helper.make_function(
        "evm", "SelectiveScan", onnx_function.INPUTS, ["y"], f.nodes, [helper.make_opsetid("", opset)]
    )


@contextmanager
def portable_without_scans(checkpoint: Path, plan: ExportPlan, folder: Path) -> Iterator[Any]:
    """Context manager: a runtime of the same network with its portable scans replaced by `no_scan`."""
    with patch.object(onnx_function, "selective_scan_function", no_scan):
        network = load_checkpoint(checkpoint, head=plan.head)
        plan, preprocessing = complete(plan, network.spec)
        target = get_target(plan.target)
        artifact = target.build(
            trace(with_pre_and_postprocessing(network, plan, preprocessing), plan, {"model": network.spec.name}),
            plan,
            folder,
        )
    with target.runtime.open(artifact.path, RunOptions(threads=1)) as runtime:
        yield runtime


def library_without_scans(target: str, folder: Path) -> Path:
    """Compile the native library for `target` into `folder`, without the recurrence in its blocks."""
    from openvino.utils import get_cmake_path

    sources = shutil.copytree(read_recipe().folder, folder / "native")
    block = sources / "scan" / "block.cpp"
    text = block.read_text()
    if text.count(CALL) != 1:
        raise SystemExit(f"layers.py: the call of the recurrence was not found in {block}")
    block.write_text(text.replace(CALL, ""))
    name = {"onnx": "evm_onnxruntime", "openvino": "evm_openvino"}[target]
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    flags = ["-DEVM_OPENVINO=ON", f"-DOpenVINO_DIR={get_cmake_path()}"]
    for arguments in (["-S", sources, "-B", folder / "build", *flags], ["--build", folder / "build", "--target", name]):
        subprocess.run([cmake, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "build" / f"{name}.so"


def without_scans(stack: ExitStack, model: LoadedBundle, checkpoint: Path, plan: ExportPlan, folder: Path) -> Any:
    """Open the network without its scans, with portable scans or native blocks as in `plan`."""
    folder.mkdir()
    if plan.scan == "portable":
        return stack.enter_context(portable_without_scans(checkpoint, plan, folder))
    options = RunOptions(threads=1, plugin=library_without_scans(plan.target, folder))
    return stack.enter_context(model.target.open(model.bundle.path / model.manifest.artifact, options))


def judge(case: tuple[str, str], checkpoint: Path, imgsz: int, rounds: int) -> bool:
    """Measure one target and scan, print one line, and return whether both checks pass."""
    target, scan = case
    asked = "auto" if case == ("onnx", "plugin") else scan
    plan = ExportPlan(target, scan=asked, imgsz=(imgsz, imgsz), precision="fp32")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        bundle = export(checkpoint, plan, Path(name))
        model = stack.enter_context(load(bundle.path, threads=1))
        bare = without_scans(stack, model, checkpoint, plan, Path(name) / "bare")
        feeds = examples(model, 1)
        times = interleave({"real": lambda: model.run(feeds), "bare": lambda: bare.run(feeds)}, rounds)
        median_ms = statistics.median(times["real"])
        saved = 1 - statistics.median(b / a for a, b in zip(times["real"], times["bare"], strict=True))
        found = sorted((measure_layers(model, feeds) for _ in range(TIMES)), key=lambda each: each["of_inference"])[
            TIMES // 2
        ]
    share, whole = found["scan_share"], found["of_inference"]
    right = share is not None and SUM[0] <= whole <= SUM[1] and abs(share - saved) <= POINTS
    kinds = ", ".join(f"{kind} {ms / found['sum_ms']:.0%}" for kind, ms in found["kinds"].items())
    print(f"{target:<9}{scan:<9} p50 {median_ms:6.2f} ms   sum {whole:6.1%}   scan {share:6.1%}", end="   ")
    print(f"saved without it {saved:6.1%}   {'ok ' if right else 'OFF'}   {kinds}", flush=True)
    return right


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--imgsz", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    print(f"{where()}, {args.checkpoint.name}, {args.imgsz}x{args.imgsz}, one thread")
    right = [judge(case, args.checkpoint, args.imgsz, args.rounds) for case in CASES]
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
