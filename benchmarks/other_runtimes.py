"""Run the loop-free ONNX file of bundles (`--scan unrolled`) in MNN and IREE: errors and latency.

    python -m venv others
    others/bin/pip install -c constraints.txt '.[onnx]' MNN iree-base-compiler iree-base-runtime
    others/bin/python benchmarks/other_runtimes.py BUNDLE.. [--rounds 9]

Errors are those of the outputs against what the self-test of the bundle expects. A bundle of the embedded digits also
classifies the 599 held-out images. Latency is CPU time of one thread, in turn with ONNX Runtime on the same file; the
script prints the median of each, and the median and band of the ratios to ONNX Runtime. A runtime that is not installed
is named. Exit code 1 if one that is installed fails, or is off by more than the bundle's own limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from common import interleave, ratio, where
from safetensors.numpy import load_file

from evm_deploy.bundle.loaded import LoadedBundle, load
from evm_deploy.demo import digits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.other_runtimes import MODULES, RUNTIMES, Run

RATIO_TO = "ONNX Runtime"


def held_out(model: LoadedBundle, run: Run) -> float:
    """Return the share of the held-out digits that a runtime classifies right."""
    images, labels = digits("heldout")
    pixels = np.stack([model.preprocessing.pixels(image) for image in images])
    values = pixels if model.manifest.input == "image" else model.preprocessing.normalise(pixels)
    answers = [int(run(value[None])["logits"].argmax()) for value in values]
    return float(np.mean(np.array(answers) == labels))


def judge(model: LoadedBundle, run: Run) -> tuple[float, bool]:
    """Return the largest error of the outputs on the self-test's inputs, and whether all are within their limits."""
    tensors = load_file(model.bundle.path / "selftest" / "probes.safetensors")
    worst, good = 0.0, True
    for index, value in enumerate(tensors[model.manifest.input]):
        for name, have in run(value[None]).items():
            error = float(np.abs(have.astype(np.float64) - tensors[name][index : index + 1]).max())
            worst, good = max(worst, error), good and error <= model.manifest.limit("outputs", name)
    return worst, good


def compare(path: Path, rounds: int, folder: Path) -> bool:
    """Compare the runtimes on one bundle. Returns whether all that are installed are right."""
    fine, timed = True, dict[str, Callable[[], Any]]()
    with load(path, threads=1) as model:
        facts = model.manifest
        if facts.plan["scan"] != "unrolled":
            raise SystemExit(f"{path}: export it with --scan unrolled")
        if not facts.batch.static or facts.batch.min != 1:
            raise SystemExit(f"{path}: export it with --batch 1")
        opset, nodes = facts.details["opset"], facts.details["nodes"]
        print(f"{path.name}, {facts.input}, opset {opset}: {nodes} nodes", flush=True)
        file, (name,) = path / facts.artifact, model.inputs
        value = load_file(path / "selftest" / "probes.safetensors")[facts.input][:1]
        timed[RATIO_TO] = partial(model.run, {name: value})
        for runtime, (module, package) in MODULES.items():
            if not find_spec(module):
                print(f"  {runtime} is not installed: pip install {package}")
                continue
            start = time.perf_counter()
            try:
                run = RUNTIMES[runtime](file, folder)
                error, good = judge(model, run)
            except Exception as reason:
                print(f"  {runtime} {metadata.version(package)} FAILED: {str(reason)[-400:]}", flush=True)
                fine = False
                continue
            took = time.perf_counter() - start
            said = f"error {error:.1e} {'ok' if good else 'TOO FAR'}, opened in {took:.0f} s"
            if facts.name.startswith("evm_digits"):
                said += f", {held_out(model, run):.2%} of the digits"
            print(f"  {runtime} {metadata.version(package)}: {said}", flush=True)
            fine = fine and good
            timed[runtime] = partial(run, value)
        times = interleave(timed, rounds, clock=time.process_time)
    for runtime, each in times.items():
        beside = f"  {ratio(times, runtime, RATIO_TO)[1]} of {RATIO_TO}" if runtime != RATIO_TO else ""
        print(f"  {runtime}: {statistics.median(each):.2f} ms{beside}", flush=True)
    return fine


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(where())
    with tempfile.TemporaryDirectory() as folder:
        fine = [compare(path, args.rounds, Path(folder)) for path in args.bundles]
    return int(not all(fine))


if __name__ == "__main__":
    sys.exit(main())
