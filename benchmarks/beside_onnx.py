"""Compare a target with ONNX Runtime on the same network: errors, accuracy, latency, size, and time to export.

    python benchmarks/beside_onnx.py executorch [CKPT..] [--imgsz 64 224] [--scan auto portable] [--rounds 60]
    python benchmarks/beside_onnx.py litert [CKPT..] --precision fp32 fp16 [--imgsz 64 224]
    python benchmarks/beside_onnx.py TARGET CKPT --precision fp32 int8 --calib IMAGES --val IMAGES [--resize stretch]

Without CKPT the embedded digits. Every checkpoint is exported and verified here: for the target in each precision and
form of the scans, and for ONNX in float32. Latency is CPU time of one thread, in turn: the target, ONNX Runtime with
native kernels, and with portable scans. The script prints the median of each, and the median and band of the ratios to
the form of ONNX Runtime in LIMITS. Exit code 1 if float32 takes longer than its limit there.
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

from evm_deploy._util.files import artifact_bytes
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.demo import CHECKPOINT
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import CALIBRATED, ExportPlan, parse_imgsz
from evm_deploy.export.source import Source

NATIVE, PORTABLE = "ONNX Runtime native", "ONNX Runtime portable"
LIMITS = {"executorch": (NATIVE, 1.2), "litert": (PORTABLE, 1.1)}  # has its own native kernels; has none


def said(bundle: Bundle) -> str:
    """Return errors, accuracy and size of a bundle as text."""
    facts = bundle.manifest
    scans = max((max(scan["ssm"], scan["probe"]) for scan in facts.parity["scans"]), default=0.0)
    size = artifact_bytes(bundle.path / facts.artifact) / 1e6
    text = f"outputs {facts.parity['max_abs']:.1e}, scans {scans:.1e}, {size:.1f} MB"
    if facts.accuracy and facts.accuracy.get("top1") is not None:
        top1, exact = facts.accuracy["top1"], facts.accuracy["top1_float"]
        text += f", top-1 {top1:.2%} (float {exact:.2%}), {facts.accuracy['images']} images"
    return text


def compare(checkpoint: str, args: argparse.Namespace, size: str | None, folder: Path) -> bool:
    """Compare the runtimes on one checkpoint at one size. Returns whether float32 keeps its limit."""
    source = Source(checkpoint)
    reference, limit = LIMITS[args.target]
    timed: dict[str, Callable[[], Any]] = {}
    print(f"{source.name}, {size or 'its own size'}", flush=True)
    plans = [("onnx", "fp32", "auto"), *((args.target, each, scan) for each in args.precision for scan in args.scan)]
    with ExitStack() as stack:
        for target, precision, scan in plans:
            given = {"calib": args.calib, "val": args.val} if precision in CALIBRATED else {}
            imgsz = parse_imgsz(size) if size else None
            plan = ExportPlan(target, precision, imgsz=imgsz, scan=scan, resize=args.resize, **given)
            start = time.process_time()
            bundle = export(source, plan, folder / scan, force=True)
            took = time.process_time() - start
            print(f"  {target} {precision} {scan}: {said(bundle)}, exported in {took:.0f} CPU s", flush=True)
            feeds = {"image": load_file(bundle.path / "selftest" / "probes.safetensors")["image"][:1]}
            forms = {NATIVE: "auto", PORTABLE: "portable"} if target == "onnx" else {f"{precision} {scan}": "auto"}
            for name, form in forms.items():
                model = stack.enter_context(load(bundle.path, threads=1, scan=form))
                timed[name] = partial(model.run, feeds)
        times = interleave(timed, args.rounds, clock=time.process_time)
    for name, each in times.items():
        print(f"  {name}: {statistics.median(each):.2f} ms  {ratio(times, name, reference)[1]} of {reference}")
    return "fp32 auto" not in times or ratio(times, "fp32 auto", reference)[0] <= limit


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=LIMITS)
    parser.add_argument("checkpoints", nargs="*", default=[str(CHECKPOINT)])
    parser.add_argument("--imgsz", nargs="+", default=[None])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--scan", nargs="+", default=["auto"])
    parser.add_argument("--rounds", type=int, default=60)
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
