"""How fast the model in this folder is on a Mac, and where its operations run. NEVER RUN BY THIS PROJECT ON A MAC.

    pip install coremltools pillow numpy
    python bench_on_mac.py     # a record of evm-deploy for each choice of compute units; --limit, --units to choose

Needs macOS 14.4 or newer for the compute plan. Standard library, numpy, Pillow, coremltools, and latency.py beside it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

try:
    from latency import Latency, measure, throughput  # type: ignore[import-not-found]  # in a bundle
except ImportError:
    from evm_deploy.bench.latency import Latency, measure, throughput

HERE = Path(__file__).parent
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
MB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each choice of units that is not stable")
    parser.add_argument("--units", default=",".join(UNITS), help=f"of {', '.join(UNITS)}")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the records")
    args = parser.parse_args()
    if sys.platform != "darwin":
        print(f"bench_on_mac.py: Core ML runs on Apple systems only, this is {sys.platform}", file=sys.stderr)
        return 3
    import coremltools as ct

    for units in args.units.split(","):
        found = record(HERE, ct, units, args.limit)
        path = args.out / f"bench-{units.lower()}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{units:<12} p50 {found['summary_ms']['p50']:.3g} ms   load {found['load_ms']['fresh']:.0f} ms   {path}")
    return 0


def record(folder: Path, ct: Any, units: str, limit_s: float) -> dict[str, Any]:
    """One record, schema 1 of evm-deploy, of the bundle in `folder` with these compute units. ct: coremltools."""
    text = (folder / "manifest.json").read_bytes()
    manifest = json.loads(text)
    path, chosen = folder / manifest["artifact"], getattr(ct.ComputeUnit, units)
    fresh_ms, model = _timed(lambda: ct.models.MLModel(str(path), compute_units=chosen))
    again_ms, model = _timed(lambda: ct.models.MLModel(str(path), compute_units=chosen))
    feeds = {manifest["inputs"][0]["name"]: example(manifest["inputs"][0])}
    first_ms, _ = _timed(lambda: model.predict(feeds))
    latency: Latency = measure(lambda: model.predict(feeds), limit_s=limit_s)
    functions = manifest["details"].get("functions", [{"name": "main"}])  # of several sizes the first is measured
    batch = manifest["inputs"][0]["shape"][0]
    sizes = [facts["size_bytes"] for name, facts in manifest["files"].items() if name.startswith(manifest["artifact"])]
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    now: dict[str, Any] = {"clocks_mhz": [], "temperatures_c": {}, "throttled": None, "load": load}
    return {
        "bundle": {
            "name": folder.resolve().name,
            "target": manifest["target"],
            "precision": manifest["plan"]["precision"],
            "imgsz": manifest["plan"]["imgsz"],
            "manifest_sha256": hashlib.sha256(text).hexdigest(),
            "artifact_bytes": sum(sizes),
        },
        "device": device(),
        "runtime": {
            "versions": {"coremltools": ct.__version__, "macos": platform.mac_ver()[0]},
            "scan": {"value": "portable", "reason": "standard MIL operations"},
            "plan": plan(model, chosen, functions[0]["name"]),
        },
        "settings": {
            "threads": None,
            "batch": batch,
            "scan": "auto",
            "device": units,
            "cache": None,
            "cuda_graph": False,
            "timed": "model",
            "limit_s": limit_s,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_ms": {"fresh": fresh_ms, "again": again_ms},
        "first_ms": first_ms,
        "warm_up": latency.warm_up,
        "stable": latency.stable,
        "samples_ms": list(latency.samples),
        "summary_ms": latency.summary(),
        "interval_ms": latency.interval(),
        "device_ms": {},
        "throughput": throughput(latency, batch),
        "memory_mb": {},
        "before": now,
        "after": now,
        "warnings": ["predict() of coremltools in Python: an app has less around it"],
        "schema_version": 1,
    }


def _timed(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def device() -> dict[str, Any]:
    """Model, chip and system, as the system names them."""

    def ask(what: str) -> str:
        try:
            return subprocess.run(["sysctl", "-n", what], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return {
        "model": ask("hw.model"),
        "cpu": ask("machdep.cpu.brand_string"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": os.cpu_count(),
        "governor": None,
        "memory_mb": int(ask("hw.memsize") or 0) // MB,
        "system": f"macOS {platform.mac_ver()[0]}",
        "python": platform.python_version(),
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
