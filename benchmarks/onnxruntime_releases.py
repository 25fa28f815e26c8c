"""Test which releases of ONNX Runtime run a bundle, with and without the native library, without evm-deploy installed.

    python benchmarks/onnxruntime_releases.py BUNDLE [--releases 1.17.3 1.22.1 ..]

Each release is installed from the package index into its own virtual environment. The script prints the largest
difference from the bundle's expected outputs, and the ratio of latencies, portable over native, with one thread. Exit
code 1 if a release fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from common import where

from evm_deploy import plugin_path

RELEASES = ("1.17.3", "1.19.2", "1.22.1", "1.24.4", "1.28.0", "1.31.1", "1.32.0")
CHECK = """
import statistics, sys, time
import numpy as np, onnxruntime as ort
from safetensors.numpy import load_file

bundle, library = sys.argv[1:]
test_inputs = load_file(bundle + "/selftest/probes.safetensors")
medians = {}
for plugin in (library, None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if plugin:
        options.register_custom_ops_library(plugin)
    session = ort.InferenceSession(bundle + "/model.onnx", options, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    outputs = [value.name for value in session.get_outputs()]
    feeds = {name: test_inputs[name][:1]}
    have = session.run(None, feeds)
    off = max(np.abs(value - test_inputs[key][:1]).max() for key, value in zip(outputs, have))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - start)
    medians[plugin] = statistics.median(times)
    print("native" if plugin else "portable", f"off by {off:.1e}", end="   ")
print(f"portable / native {medians[None] / medians[library]:.2f}")
"""


def environment(folder: Path, release: str) -> Path:
    """Make a virtual environment with a release of onnxruntime and return the path of its python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    numpy = ["numpy<2"] if tuple(map(int, release.split(".")[:2])) < (1, 19) else ["numpy"]
    packages = [f"onnxruntime=={release}", "safetensors", *numpy]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, stderr=subprocess.DEVNULL)
    return python


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--releases", nargs="+", default=RELEASES)
    args = parser.parse_args()
    print(f"{where()}, {args.bundle.name}")
    failed = False
    for release in args.releases:
        with tempfile.TemporaryDirectory() as folder:
            command = [environment(Path(folder), release), "-c", CHECK, args.bundle, plugin_path("onnxruntime")]
            done = subprocess.run(command, capture_output=True, text=True)
        print(f"{release:<8}", done.stdout.strip() if done.returncode == 0 else done.stderr.strip()[-300:], flush=True)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
