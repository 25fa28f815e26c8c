"""Many inferences of the embedded demo on the native kernel: memory must not grow, results must not change.

    python benchmarks/soak.py [--target onnx] [--inferences 100000]

Resident memory is read after the first hundredth and at the end. Exit 1 when it grew by over 1 MB, or a bit changed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import where

from evm_deploy import ExportPlan, export, load
from evm_deploy.demo import CHECKPOINT

MAX_GROWTH_MB = 1.0


def resident_mb() -> float:
    """Resident memory of this process now. Linux only."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inferences", type=int, default=100_000)
    parser.add_argument("--target", default="onnx", choices=("onnx", "openvino"))
    args = parser.parse_args()
    count = args.inferences
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(CHECKPOINT, ExportPlan(args.target), folder)
        with load(bundle.path, threads=1, scan="plugin") as model:
            height, width = bundle.manifest.preprocessing["size"]
            pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
            first = model.run({"image": pixels})["logits"]
            early = changed = 0
            start = time.perf_counter()
            for i in range(count):
                changed += not np.array_equal(model.run({"image": pixels})["logits"], first)
                if i == count // 100:
                    early = resident_mb()
            seconds, late = time.perf_counter() - start, resident_mb()
    print(where())
    print(f"{count} inferences in {seconds:.0f} s, {model.scan.reason}")
    print(f"resident {early:.1f} MB after {count // 100}, {late:.1f} MB at the end; results that differ: {changed}")
    return int(late - early > MAX_GROWTH_MB or changed > 0)


if __name__ == "__main__":
    sys.exit(main())
