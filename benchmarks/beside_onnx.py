"""Compare ExecuTorch with ONNX Runtime on the same checkpoint: size, load time, and latency of one thread.

    pip install -c constraints.txt '.[executorch]'
    python benchmarks/beside_onnx.py [CKPT] [--imgsz 224] [--portable] [--rounds 60]

Both bundles are exported and verified here, in float32. Latency is CPU time of one thread, in turn; the script prints
the median of each, and the median and band of the ratios to ONNX Runtime with native kernels. --portable: also the
programs without our operators, of both runtimes, whose export takes minutes. Exit code 1 if ExecuTorch with our
operators takes more than 1.2 times as long as ONNX Runtime with them.
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

import numpy as np
from common import interleave, ratio, where

from evm_deploy import load
from evm_deploy._util.files import artifact_bytes
from evm_deploy.demo import CHECKPOINT
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan, parse_imgsz
from evm_deploy.export.source import Source

LIMIT = 1.2
REFERENCE, SUBJECT = "onnx auto", "executorch auto"


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=CHECKPOINT)
    parser.add_argument("--imgsz", type=parse_imgsz)
    parser.add_argument("--portable", action="store_true")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    print(where())
    source, timed = Source(args.checkpoint), dict[str, Callable[[], Any]]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        for target in ("onnx", "executorch"):
            for scan in ("auto", "portable") if args.portable else ("auto",):
                start = time.process_time()
                bundle = export(source, ExportPlan(target, imgsz=args.imgsz, scan=scan), Path(folder) / scan)
                seconds = time.process_time() - start
                model = opened.enter_context(load(bundle.path, threads=1))
                ((name, spec),) = model.inputs.items()
                pixels = np.random.default_rng(0).integers(0, 256, [size or 1 for size in spec.shape], np.uint8)
                timed[f"{target} {scan}"] = partial(model.run, {name: pixels})
                size = artifact_bytes(bundle.path / bundle.manifest.artifact) / 1e6
                error = bundle.manifest.parity["max_abs"]
                print(
                    f"  {target} {scan}: {size:.1f} MB, error {error:.1e}, exported in {seconds:.0f} CPU s", flush=True
                )
        times = interleave(timed, args.rounds, clock=time.process_time)
    for name, each in times.items():
        print(f"  {name}: {statistics.median(each):.2f} ms  {ratio(times, name, REFERENCE)[1]} of {REFERENCE}")
    return int(ratio(times, SUBJECT, REFERENCE)[0] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
