"""Compare ONNX Runtime Web in Chromium with ONNX Runtime in Python: latency with one thread, and size of the download.

    python benchmarks/web.py BUNDLE.. [--rounds 10] [--runs 10]

Latency is that of inference, without preprocessing. Each round takes the median of `runs` inferences in the browser, in
Python with portable scans, and in Python with native kernels; the script prints the ratios of the rounds. Sizes are
those of the built sample, plain and with gzip.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import where

from evm_deploy.bundle.loaded import LoadedBundle, load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.web import LIBRARY, Browser, build, served

OPEN = """const bundle = await evm.Bundle.open(evm.folderAt("files"));
window.model = await evm.Model.open(bundle, { provider: "wasm", threads: 1 });
await window.model.bench({ warmUp: 5, runs: 5 });"""


def median_ms(model: LoadedBundle, runs: int) -> float:
    """Measure the latency of one bundle in Python."""
    ((name, spec),) = model.inputs.items()
    value = np.full([1 if side is None else side for side in spec.shape], 127, spec.dtype)
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        model.run({name: value})
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def ratio(times: list[float], base: list[float]) -> str:
    """Format the median ratio of `times` to `base`, with its range."""
    each = sorted(a / b for a, b in zip(times, base, strict=True))
    return f"{statistics.median(each):.2f}x ({each[0]:.2f} to {each[-1]:.2f})"


def compare(browser: Browser, bundle: Path, rounds: int, runs: int) -> None:
    """Measure a bundle in the browser and in Python and print the ratios."""
    browser.library(OPEN, files=bundle)
    with load(bundle, threads=1, scan="portable") as portable, load(bundle, threads=1) as best:
        median_ms(portable, runs), median_ms(best, runs)
        times: dict[str, list[float]] = {"web": [], "portable": [], best.scan.value: []}
        for _ in range(rounds):
            code = f"return (await window.model.bench({{ warmUp: 2, runs: {runs} }})).p50;"
            times["web"].append(browser.library(code))
            times["portable"].append(median_ms(portable, runs))
            times[best.scan.value].append(median_ms(best, runs))
    checks = browser.library("return window.model.selftest();", files=bundle)
    browser.library("await window.model.close();")
    middle = "   ".join(f"{name} {statistics.median(each):.2f} ms" for name, each in times.items())
    print(f"{bundle.name}   self-test {'passed' if all(check['ok'] for check in checks) else 'FAILED'}\n  {middle}")
    for name in list(times)[1:]:
        print(f"  web over Python, {name}: {ratio(times['web'], times[name])}")


def sizes(site: Path) -> None:
    """Print the size of the download: the page without the files for WebGPU, and these files."""
    files = [file for file in (site / "dist").rglob("*") if file.is_file() and "library" not in file.name]
    groups = {
        "page": [f for f in files if f.suffix in (".html", ".css", ".js", ".svg") and "ort" not in f.name],
        "ONNX Runtime, WebAssembly": [
            f for f in files if "ort" in f.name and "asyncify" not in f.name and "gpu" not in f.name
        ],
        "ONNX Runtime, WebGPU": [f for f in files if "asyncify" in f.name or "webgpu" in f.name],
        "bundle": [f for f in files if "bundle" in f.parts],
    }
    for name, group in groups.items():
        plain = sum(file.stat().st_size for file in group)
        packed = sum(len(gzip.compress(file.read_bytes(), 6)) for file in group)
        print(f"{name:<26} {plain / 1e6:7.2f} MB   gzip {packed / 1e6:6.2f} MB")


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    print(where())
    with tempfile.TemporaryDirectory() as folder:
        site = build(Path(folder) / "site", args.bundles[0].resolve(), LIBRARY)
        sizes(site)
        with served(site) as address, Browser(address) as browser:
            for bundle in args.bundles:
                compare(browser, bundle.resolve(), args.rounds, args.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
