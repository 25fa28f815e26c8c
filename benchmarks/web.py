"""Compare ONNX Runtime Web in Chromium with ONNX Runtime in Python: latency and size of the download.

    python benchmarks/web.py BUNDLE.. [--rounds 10] [--runs 10] [--threads 1] [--node]

Latency is that of inference, without preprocessing. Native kernels have one thread in the web SDK, whatever the number
of threads. Each round takes the median of `runs` inferences in the browser and
in Python, with portable scans and with native kernels; the script prints the ratios of the rounds. --node measures the
web SDK in Node too. Sizes are those of the built sample, plain and with gzip. Bundles come from `evm-export --target
onnx --platform browser-wasm32`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import ratio, where

from evm_deploy.bundle.loaded import LoadedBundle, load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.web import LIBRARY, Browser, build, served

SCRIPT = Path(__file__).with_name("web_node.mjs")
OPEN = """const bundle = await evm.Bundle.open(evm.folderAt("files"));
window.models = {};
for (const scan of ["portable", "bundled"]) {
    window.models[scan] = await evm.Model.open(bundle, { provider: "wasm", threads: given, scan });
    await window.models[scan].bench({ warmUp: 5, runs: 5 });
}"""
RUN = "return (await window.models[given.scan].bench({ warmUp: 2, runs: given.runs })).p50;"
CLOSE = """const checks = (await Promise.all(Object.values(window.models).map((model) => model.selftest()))).flat();
await Promise.all(Object.values(window.models).map((model) => model.close()));
return checks.every((check) => check.ok);"""
PORTABLE, NATIVE = "portable", "bundled"  # values of `scan` in the web SDK


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


class Node:
    """The web SDK in Node (web_node.mjs) with one bundle open."""

    def __init__(self, site: Path, bundle: Path, threads: int) -> None:
        command = ["node", "--no-warnings", SCRIPT, site, bundle, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def median_ms(self, scan: str, runs: int) -> float:
        """Return the latency of a lowering."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"scan": scan, "runs": runs}), file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(browser: Browser, bundle: Path, args: argparse.Namespace, node: Node | None) -> None:
    """Measure a bundle in the browser, in Python and in Node, in turn, and print the ratios."""
    runs, threads = args.runs, args.threads
    browser.library(OPEN, threads, files=bundle)
    with (
        load(bundle, threads=threads, scan="portable") as portable,
        load(bundle, threads=threads, scan="plugin") as native,
    ):
        subjects: dict[str, Callable[[], float]] = {
            "web portable": lambda: browser.library(RUN, {"scan": PORTABLE, "runs": runs}),
            "web native": lambda: browser.library(RUN, {"scan": NATIVE, "runs": runs}),
            "Python portable": lambda: median_ms(portable, runs),
            "Python native": lambda: median_ms(native, runs),
        }
        if node:
            subjects["Node portable"] = lambda: node.median_ms(PORTABLE, runs)
            subjects["Node native"] = lambda: node.median_ms(NATIVE, runs)
        times: dict[str, list[float]] = {name: [] for name in subjects}
        for i in range(args.rounds + 1):
            for name, measure in subjects.items():
                value = measure()
                if i:  # the first round warms up
                    times[name].append(value)
    passed = browser.library(CLOSE, files=bundle)
    print(f"{bundle.name}   self-tests {'passed' if passed else 'FAILED'}")
    print("  " + "   ".join(f"{name} {statistics.median(each):.2f} ms" for name, each in times.items()))
    pairs = [("web portable", "web native"), ("web portable", "Python portable"), ("web native", "Python native")]
    for name, to in [*pairs, *([("Node portable", "Node native")] if node else [])]:
        print(f"  {name} over {to}: {ratio(times, name, to)[1]}")


def sizes(site: Path) -> None:
    """Print the size of the download: the page without the files for WebGPU, and these files."""
    own = ("library", "evm-")  # starts of the names of files that only this benchmark needs
    files = [file for file in (site / "dist").rglob("*") if file.is_file() and not file.name.startswith(own)]
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--node", action="store_true")
    args = parser.parse_args()
    print(f"{where()}, {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        site = build(Path(folder) / "site", args.bundles[0].resolve(), LIBRARY)
        sizes(site)
        with served(site) as address, Browser(address) as browser:
            for bundle in args.bundles:
                node = Node(site, bundle.resolve(), args.threads) if args.node else None
                compare(browser, bundle.resolve(), args, node)
                if node:
                    node.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
