"""Compare evm-bench with the runtimes' own tools: a plain session loop of onnxruntime, and benchmark_app of OpenVINO.

    python benchmarks/bench_agreement.py ONNX_BUNDLE OPENVINO_BUNDLE [--rounds 5]

One thread, batch 1. In each round evm-bench and the other tool measure once, in turn. The script prints the ratio of
their medians for each round. Exit code 1 if the median ratio differs from 1 by more than 5 %.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from common import where

from evm_deploy import plugin_path
from evm_deploy.bench import bench
from evm_deploy.bench.record import Settings
from evm_deploy.bundle.bundle import open_bundle

LIMIT = 0.05
SECONDS = 5
LOOP = """
import statistics, sys, time
import numpy as np, onnxruntime as ort

options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.register_custom_ops_library(sys.argv[2])
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
value = session.get_inputs()[0]
feeds = {value.name: np.random.default_rng(0).integers(0, 256, value.shape, np.uint8)}
times, end = [], time.perf_counter() + float(sys.argv[3])
while time.perf_counter() < end:
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
print(1e3 * statistics.median(times[len(times) // 5 :]))
"""


def ours(bundle: Path) -> float:
    """Measure the median latency of a bundle with evm-bench, in milliseconds."""
    return bench(bundle, Settings(threads=1, limit_s=30)).summary_ms["p50"]


def session_loop(bundle: Path) -> float:
    """Measure the median latency of an ONNX bundle in a plain session loop, in milliseconds."""
    command = [sys.executable, "-c", LOOP, bundle / "model.onnx", plugin_path("onnxruntime"), str(SECONDS)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def benchmark_app(bundle: Path) -> float:
    """Measure the median latency of an OpenVINO bundle with benchmark_app, in milliseconds."""
    library = next(iter(open_bundle(bundle).manifest.plugins.values()))
    tool = shutil.which("benchmark_app", path=str(Path(sys.executable).parent)) or "benchmark_app"
    flags = "-d CPU -infer_precision f32 -hint none -nstreams 1 -nthreads 1 -api sync"
    command = [tool, "-m", "model.xml", "-extensions", library, *flags.split(), "-t", str(SECONDS)]
    done = subprocess.run(command, cwd=bundle, check=True, capture_output=True, text=True)
    number, unit = re.findall(r"Median:\s+([\d.]+) (ms|us)", done.stdout)[0]
    return float(number) / (1e3 if unit == "us" else 1)


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("openvino", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(where())
    tools: list[tuple[str, Path, Callable[[Path], float]]] = [
        ("bare session loop", args.onnx, session_loop),
        ("benchmark_app", args.openvino, benchmark_app),
    ]
    off = False
    for name, bundle, tool in tools:
        ratios = [ours(bundle) / tool(bundle) for _ in range(args.rounds)]
        median = statistics.median(ratios)
        print(
            f"evm-bench / {name:<18} {median:.3f}   rounds {' '.join(f'{ratio:.3f}' for ratio in ratios)}", flush=True
        )
        off |= abs(median - 1) > LIMIT
    return int(off)


if __name__ == "__main__":
    sys.exit(main())
