"""Measure the Core ML model in this folder on a Mac: latency and compute plan. NEVER RUN BY THIS PROJECT ON A MAC.

    pip install coremltools pillow numpy
    python bench_on_mac.py     # writes one record of evm-deploy for each choice of compute units; see --help

The compute plan needs macOS 14.4 or newer. The script uses the standard library, numpy, Pillow, coremltools, and the
files latency.py and compute_plan.py in the same folder.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

try:
    from latency import Latency, agree, measure, throughput  # type: ignore[import-not-found]  # in a bundle
except ImportError:
    from evm_deploy.bench.latency import Latency, agree, measure, throughput
try:
    from compute_plan import compute_plan  # type: ignore[import-not-found]
except ImportError:
    from evm_deploy.runtimes.coreml.compute_plan import compute_plan

HERE = Path(__file__).parent
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
MB = 1 << 20
PHONE_RUNS = 200


@dataclass(frozen=True)
class MacRun:
    """Result for one choice of compute units: times in ms, facts of the device, and Core ML's compute plan."""

    latency: Latency
    load_ms: dict[str, float]
    first_ms: float
    device: dict[str, Any]
    plan: dict[str, Any]
    warning: str


def main() -> int:
    """Measure with every choice of compute units and write one record each. Return the exit code; 3 if not on a Mac."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="longest time for one choice of units in s, default 60"
    )
    parser.add_argument("--units", default=",".join(UNITS), help=f"compute units: any of {', '.join(UNITS)}")
    parser.add_argument(
        "--iphone", metavar="TEAM", help="measure on the connected iPhone, through Xcode, as this development team"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the records, default: the script's")
    args = parser.parse_args()
    if sys.platform != "darwin":
        print(f"bench_on_mac.py: Core ML runs on Apple systems only, this is {sys.platform}", file=sys.stderr)
        return 3
    import coremltools as ct

    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    for units in args.units.split(","):
        chosen = getattr(ct.ComputeUnit, units)
        if args.iphone:
            found = asyncio.run(on_iphone(ct, HERE, manifest, chosen, args.iphone))
        else:
            found = on_mac(ct, HERE, manifest, chosen, args.limit)
        path = args.out / f"bench-{units.lower()}{'-iphone' if args.iphone else ''}.json"
        path.write_text(json.dumps(make_record(HERE, ct, units, found, args.limit), indent=1) + "\n", encoding="utf-8")
        print(f"{units:<12} p50 {found.latency.median:.3g} ms   load {found.load_ms['fresh']:.0f} ms   {path}")
    return 0


def on_mac(ct: Any, folder: Path, manifest: dict[str, Any], units: Any, limit_s: float) -> MacRun:
    """Measure the package in `folder` on this Mac. ct: the module coremltools. units: a ct.ComputeUnit."""
    path, spec = folder / manifest["artifact"], manifest["inputs"][0]
    fresh_ms, model = _timed(lambda: ct.models.MLModel(str(path), compute_units=units))
    again_ms, model = _timed(lambda: ct.models.MLModel(str(path), compute_units=units))
    feeds = {spec["name"]: example(spec)}
    first_ms, _ = _timed(lambda: model.predict(feeds))
    latency: Latency = measure(lambda: model.predict(feeds), limit_s=limit_s)
    where = compute_plan(model, units, function_name(manifest))
    warning = "measured with predict() of coremltools in Python: an app has less overhead"
    return MacRun(latency, {"fresh": fresh_ms, "again": again_ms}, first_ms, this_mac(), where, warning)


async def on_iphone(ct: Any, folder: Path, manifest: dict[str, Any], units: Any, team: str) -> MacRun:
    """Measure the package in `folder` on the connected iPhone, with coremltools' app, which Xcode signs for `team`."""
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials, Device, DeviceType

    phones = Device.get_connected_devices(DeviceType.IPHONE)
    if not phones:
        raise SystemExit("bench_on_mac.py: no iPhone is connected: plug one in, unlock it, switch developer mode on")
    phone = await phones[0].prepare_for_model_debugging(credentials=AppSigningCredentials(development_team=team))
    spec = manifest["inputs"][0]
    benchmark = MLModelBenchmarker(ct.models.MLModel(str(folder / manifest["artifact"]), compute_units=units), phone)
    loads = (await benchmark.benchmark_load(iterations=2)).samples
    feeds = {spec["name"]: example(spec)}
    first = (await benchmark.benchmark_predict(feeds, iterations=1)).samples[0]
    samples = (await benchmark.benchmark_predict(feeds, iterations=PHONE_RUNS, warmup=True)).samples
    thirds = [median(samples[i::3]) for i in range(3)]
    latency = Latency(tuple(samples), 2, agree(thirds))
    facts = {"model": phone.name, "cpu": phone.type.value, "machine": "arm64", "system": f"iOS {phone.os_version}"}
    device = {**dict.fromkeys(this_mac()), **facts}
    warning = "only the prediction is timed, by coremltools' app on the phone"
    return MacRun(latency, {"fresh": loads[0], "again": loads[1]}, first, device, {}, warning)


def make_record(folder: Path, ct: Any, units: str, found: MacRun, limit_s: float) -> dict[str, Any]:
    """Return the record, schema 1 of evm-deploy, for the bundle in `folder`. ct: the module coremltools."""
    text = (folder / "manifest.json").read_bytes()
    manifest = json.loads(text)
    batch = manifest["inputs"][0]["shape"][0]
    sizes = [facts["size_bytes"] for name, facts in manifest["files"].items() if name.startswith(manifest["artifact"])]
    state: dict[str, Any] = {"clocks_mhz": [], "temperatures_c": {}, "throttled": None, "load": None}
    return {
        "bundle": {
            "name": folder.resolve().name,
            "model": manifest["model"]["name"],
            "target": manifest["target"],
            "precision": manifest["plan"]["precision"],
            "imgsz": manifest["plan"]["imgsz"],
            "manifest_sha256": hashlib.sha256(text).hexdigest(),
            "artifact_bytes": sum(sizes),
            "accuracy": manifest["accuracy"],
        },
        "device": {"at": None, "profile": None, **found.device},
        "runtime": {
            "versions": {"coremltools": ct.__version__, "macos": platform.mac_ver()[0]},
            "scan": {"value": "portable", "reason": "standard MIL operations"},
            "plan": found.plan,
        },
        "settings": {
            "threads": None,
            "batch": batch,
            "scan": "auto",
            "device": units,
            "cache": None,
            "cuda_graph": False,
            "providers": None,
            "provider_options": None,
            "streams": 1,
            "timed": "model",
            "imgsz": None,
            "weights": None,
            "drop": None,
            "limit_s": limit_s,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_ms": found.load_ms,
        "first_ms": found.first_ms,
        "warm_up": found.latency.warm_up,
        "stable": found.latency.stable,
        "samples_ms": list(found.latency.samples),
        "summary_ms": found.latency.summary(),
        "interval_ms": found.latency.interval(),
        "device_ms": {},
        "layers": {},
        "energy_mj": {},
        "throughput": throughput(found.latency, batch),
        "memory_mb": {},
        "before": state,
        "after": state,
        "warnings": [found.warning],
        "schema_version": 1,
    }


def function_name(manifest: dict[str, Any]) -> str:
    """Return the name of the package's default function: the first one, if the package has several input sizes."""
    return str(manifest["details"].get("functions", [{"name": "main"}])[0]["name"])


def _timed(call: Any) -> tuple[float, Any]:
    """Call `call` once and return its duration in ms and its result."""
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def this_mac() -> dict[str, Any]:
    """Return model, chip, cores, memory and system of this Mac for `Record.device`."""

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
        "gpus": [],
    }


def example(spec: dict[str, Any]) -> Any:
    """Return a seeded random input: a Pillow image for a uint8 input, else a float32 array."""
    import numpy as np
    import PIL.Image

    rng = np.random.default_rng(0)
    if spec["dtype"] == "uint8":
        pixels = rng.integers(0, 256, spec["shape"][1:], np.uint8)
        return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return rng.standard_normal(spec["shape"]).astype(np.float32)


if __name__ == "__main__":
    raise SystemExit(main())
