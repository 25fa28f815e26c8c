"""Compare the C++ SDK with Python: latency of the same bundle, preprocessing of the same image.

    python benchmarks/cpp_sdk.py BUNDLE.. [--rounds 7]

One thread, batch 1. In each round evm-bench and evm-classify --bench measure once, in turn. The scans are portable or,
if the bundle has no portable scans, run on the bundle's native library. Preprocessing is measured on noise images in
memory, resized to 224x224, with C++ and Pillow in turn. Exit code 1 if a median ratio of latencies differs from 1 by
more than 5 %. The script builds the SDK in build/sdk-cpp.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import interleave, ratio, where

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evm_deploy.bench import bench
from evm_deploy.bench.record import Settings
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.data.preprocessing import Preprocessing
from tests.sdk_cpp import Model, build, changed, classify

LIMIT = 0.05
SECONDS = 20
IMAGES = ((4000, 3000), (3000, 4000), (640, 480), (100, 80))  # width, height


def latency(bundle: Path, rounds: int) -> float:
    """Print the ratios of latency, C++ over Python, of all rounds and return their median."""
    scan = "portable" if "portable" in open_bundle(bundle).manifest.scan["value"] else "bundled"
    ratios, medians = [], []
    for _ in range(rounds):
        python = bench(bundle, Settings(threads=1, scan=scan, limit_s=SECONDS)).summary_ms["p50"]
        done = classify(bundle, "--bench", "--threads", 1, "--scan", scan, "--seconds", SECONDS, "--json")
        cpp = json.loads(done.stdout)["p50"]
        ratios.append(cpp / python)
        medians.append(cpp)
    median = statistics.median(ratios)
    every = " ".join(f"{each:.3f}" for each in ratios)
    print(f"{bundle.name}, {scan}: C++ {statistics.median(medians):.3f} ms, {median:.3f} of evm-bench ({every})")
    return median


def preprocessing(bundle: Path) -> None:
    """Compare the pixels and the times of preprocessing, C++ with Pillow, and print the times."""
    spec = Preprocessing((224, 224))
    with tempfile.TemporaryDirectory() as folder:
        wanted = {"size": spec.size, "crop_pct": spec.crop_pct, "interpolation": spec.interpolation}
        with Model(changed(bundle, Path(folder), lambda content: content["preprocessing"].update(wanted))) as model:
            for width, height in IMAGES:
                noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
                assert np.array_equal(model.preprocess(noise), spec.pixels(noise))
                subjects = {"C++": lambda n=noise: model.preprocess(n), "Pillow": lambda n=noise: spec.pixels(n)}
                times = interleave(subjects, rounds=10)
                means = ", ".join(f"{name} {statistics.median(values):.2f} ms" for name, values in times.items())
                print(f"{width}x{height} -> 224x224: {means}, {ratio(times, 'C++', 'Pillow')[1]}")


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(where())
    build("release")
    preprocessing(args.bundles[0])
    ratios = [latency(bundle, args.rounds) for bundle in args.bundles]
    return int(any(abs(each - 1) > LIMIT for each in ratios))


if __name__ == "__main__":
    sys.exit(main())
