"""Compare LiteRT bundles with ONNX Runtime on the same network: errors, latency, size.

    python benchmarks/litert.py [CKPT..] [--imgsz 64 224] [--rounds 15] [--precision fp32 fp16]
    python benchmarks/litert.py CKPT --precision fp32 int8 --calib IMAGES --val IMAGES [--resize stretch]

Without CKPT the embedded digits. Every checkpoint is exported for LiteRT in each precision, and in float32 for ONNX.
Latency is CPU time of one thread, in turn: LiteRT, ONNX Runtime with portable scans, and with native kernels. The
script prints the median of each, and the median and band of its ratios to ONNX Runtime portable. Exit code 1 if
float32 takes longer than MAX_TO_PORTABLE times ONNX Runtime portable.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from common import interleave, ratio, where
from safetensors.numpy import load_file

from evm_deploy.bundle.bundle import Bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.demo import CHECKPOINT
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import CALIBRATED, ExportPlan, parse_imgsz
from evm_deploy.export.source import Source

MAX_TO_PORTABLE = 1.1
PORTABLE, NATIVE = "ONNX Runtime portable", "ONNX Runtime native"


def said(bundle: Bundle) -> str:
    """Return errors, accuracy and size of a bundle as text."""
    facts = bundle.manifest
    scans = max((max(scan["ssm"], scan["probe"]) for scan in facts.parity["scans"]), default=0.0)
    size = (bundle.path / facts.artifact).stat().st_size / 1e6
    text = (
        f"outputs {facts.parity['max_abs']:.1e} (limit {facts.parity['limit']:.1e}), scans {scans:.1e}, {size:.1f} MB"
    )
    if facts.accuracy and facts.accuracy.get("top1") is not None:
        top1, exact = facts.accuracy["top1"], facts.accuracy["top1_float"]
        text += f", top-1 {top1:.2%} (float {exact:.2%}), {facts.accuracy['images']} images"
    return text


def compare(checkpoint: str, args: argparse.Namespace, size: str, folder: Path) -> bool:
    """Compare the runtimes on one checkpoint at one size. Returns whether float32 is fast enough."""
    source = Source(checkpoint)
    timed: dict[str, Callable[[], Any]] = {}
    print(f"{source.name}, {size}", flush=True)
    with ExitStack() as stack:
        for target, precision in (("onnx", "fp32"), *(("litert", each) for each in args.precision)):
            given = {"calib": args.calib, "val": args.val} if precision in CALIBRATED else {}
            plan = ExportPlan(target, precision, imgsz=parse_imgsz(size), resize=args.resize, **given)
            bundle = export(source, plan, folder, force=True)
            print(f"  {target} {precision}: {said(bundle)}", flush=True)
            feeds = {"image": load_file(bundle.path / "selftest" / "probes.safetensors")["image"][:1]}
            forms = {PORTABLE: "portable", NATIVE: "auto"} if target == "onnx" else {f"LiteRT {precision}": "auto"}
            for name, scan in forms.items():
                model = stack.enter_context(load(bundle.path, threads=1, scan=scan))
                timed[name] = partial(model.run, feeds)
        times = interleave(timed, args.rounds, clock=time.process_time)
    for name, each in times.items():
        print(
            f"  {name}: {statistics.median(each):.2f} ms  {ratio(times, name, PORTABLE)[1]} of {PORTABLE}", flush=True
        )
    return "LiteRT fp32" not in times or ratio(times, "LiteRT fp32", PORTABLE)[0] <= MAX_TO_PORTABLE


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=[str(CHECKPOINT)])
    parser.add_argument("--imgsz", nargs="+", default=["64"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "fp16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--resize")
    parser.add_argument("--calib")
    parser.add_argument("--val")
    args = parser.parse_args()
    print(where())
    with tempfile.TemporaryDirectory() as folder:
        fine = [compare(path, args, size, Path(folder)) for path in args.checkpoints for size in args.imgsz]
    return int(not all(fine))


if __name__ == "__main__":
    sys.exit(main())
