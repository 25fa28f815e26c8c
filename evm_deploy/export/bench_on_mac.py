"""How fast the model in this folder is on a Mac, and where its operations run. NEVER RUN BY THIS PROJECT.

    pip install coremltools pillow numpy
    python bench_on_mac.py                     # writes bench.json; --runs, --units to choose

Needs macOS 14.4 or newer for the compute plan. Standard library, numpy, Pillow and coremltools only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=200, help="timed predictions for each choice of units")
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--units", default=",".join(UNITS), help=f"of {', '.join(UNITS)}")
    parser.add_argument("--out", type=Path, default=HERE / "bench.json")
    args = parser.parse_args()
    if sys.platform != "darwin":
        print(f"bench_on_mac.py: Core ML runs on Apple systems only, this is {sys.platform}", file=sys.stderr)
        return 3
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    record = {
        "bundle": manifest["name"],
        "artifact_files": {k: v["sha256"] for k, v in manifest["files"].items() if k.startswith(manifest["artifact"])},
        "device": device(),
        "timed": "predict() of coremltools in Python, host to host, one input at a time",
        "warm_up": args.warm_up,
        "results": [measure(manifest, units, args.runs, args.warm_up) for units in args.units.split(",")],
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for result in record["results"]:
        print(f"{result['units']:<12} p50 {result['p50_ms']:.2f} ms   load {result['load_s']:.2f} s   {result['plan']}")
    print(f"written to {args.out}")
    return 0


def device() -> dict[str, str]:
    """Model, chip and system, as the system names them."""
    chip = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    model = subprocess.run(["sysctl", "-n", "hw.model"], capture_output=True, text=True).stdout.strip()
    return {"model": model, "chip": chip, "macos": platform.mac_ver()[0], "machine": platform.machine()}


def measure(manifest: dict[str, Any], units: str, runs: int, warm_up: int) -> dict[str, Any]:
    """Latency in milliseconds with these compute units, and how many operations are planned on which device."""
    import coremltools as ct

    path = HERE / manifest["artifact"]
    start = time.perf_counter()
    model = ct.models.MLModel(str(path), compute_units=getattr(ct.ComputeUnit, units))
    load_s = time.perf_counter() - start
    functions = manifest["details"].get("functions", [{"name": "main"}])  # of several sizes the first is measured
    feeds = {manifest["inputs"][0]["name"]: example(manifest["inputs"][0])}
    start = time.perf_counter()
    model.predict(feeds)
    first_ms = 1e3 * (time.perf_counter() - start)
    times = []
    for _ in range(warm_up + runs):
        start = time.perf_counter()
        model.predict(feeds)
        times.append(1e3 * (time.perf_counter() - start))
    samples = sorted(times[warm_up:])
    return {
        "units": units,
        "load_s": load_s,
        "first_ms": first_ms,
        "p50_ms": statistics.median(samples),
        **{f"p{p}_ms": samples[min(len(samples) - 1, len(samples) * p // 100)] for p in (90, 95, 99)},
        "mean_ms": statistics.fmean(samples),
        "min_ms": samples[0],
        "max_ms": samples[-1],
        "samples_ms": samples,
        "plan": plan(model, getattr(ct.ComputeUnit, units), functions[0]["name"]),
    }


def example(spec: dict[str, Any]) -> Any:
    """A seeded input: a picture for an image, noise for a tensor."""
    import numpy as np
    import PIL.Image

    rng = np.random.default_rng(0)
    if spec["dtype"] == "uint8":
        return PIL.Image.fromarray(rng.integers(0, 256, spec["shape"][1:], np.uint8))
    return rng.standard_normal(spec["shape"]).astype(np.float32)


def plan(model: Any, units: Any, function: str) -> dict[str, Any]:
    """Operations and share of the estimated cost by preferred device; of the scans alone, too."""
    from coremltools.models.compute_plan import MLComputePlan

    loaded = MLComputePlan.load_from_path(path=model.get_compiled_model_path(), compute_units=units)
    counts: Counter[str] = Counter()
    costs: dict[str, float] = {}
    for operation in loaded.model_structure.program.functions[function].block.operations:
        usage = loaded.get_compute_device_usage_for_mlprogram_operation(operation)
        cost = loaded.get_estimated_cost_for_mlprogram_operation(operation)
        if usage is None:
            continue
        where = type(usage.preferred_compute_device).__name__.removeprefix("ML").removesuffix("ComputeDevice")
        scan = any(output.name.startswith("evm_scan") for output in operation.outputs)
        for name in (where, f"{where} of scans") if scan else (where,):
            counts[name] += 1
            costs[name] = costs.get(name, 0.0) + (cost.weight if cost else 0.0)
    return {"operations": dict(counts), "cost": {name: round(value, 4) for name, value in costs.items()}}


if __name__ == "__main__":
    raise SystemExit(main())
