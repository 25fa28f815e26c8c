"""Records by hand, complete, for tests of what reads them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from evm_deploy.bench.latency import Latency
from evm_deploy.bench.record import Record

JUDGED = {
    "images": 599,
    "images_sha256": "0" * 64,
    "sqnr_db": 40.1,
    "agreement": 0.998,
    "relative_error": 0.01,
    "psnr_db": 45.0,
    "metric": "top1",
    "top1": 0.993,
    "top1_float": 0.995,
    "top5": 1.0,
    "top5_float": 1.0,
    "limit": 1.0,
    "drop": 0.2,
    "ok": True,
}
LAYERS = {
    "how": "ONNX Runtime's profiler",
    "sum_ms": 0.95,
    "of_inference": 0.95,
    "scan_share": 0.4,
    "selection_share": 0.2,
    "kinds": {"scan": 0.38, "projection": 0.2, "convolution": 0.25, "norm": 0.07, "layout": 0.05},
    "modules": [
        {"module": "layers.0.blocks.1.op", "kind": "scan", "ms": 0.38, "calls": 1},
        {"module": "layers.0.blocks.1.in_proj", "kind": "projection", "ms": 0.2, "calls": 1},
        {"module": "layers.2.3.conv", "kind": "convolution", "ms": 0.25, "calls": 2},
    ],
}


def content(
    target: str = "onnx",
    precision: str = "fp32",
    median: float = 1.0,
    spread: float = 0.01,
    accuracy: dict[str, Any] | None = None,
    changes: dict[str, dict[str, Any]] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A record's JSON. spread: half the interval, relative. changes: by section, such as {"settings": {"batch": 4}}."""
    samples = [round(float(value), 5) for value in median * np.linspace(1 - spread, 1 + spread, 25)]
    state = {"clocks_mhz": [], "temperatures_c": {}, "throttled": None, "load": 0.1}
    made: dict[str, Any] = {
        "bundle": {
            "name": f"evm_tiny-{target}-{precision}-64x64",
            "model": "evm_tiny",
            "target": target,
            "precision": precision,
            "imgsz": [64, 64],
            "manifest_sha256": f"{target}-{precision}",
            "artifact_bytes": 500_000 if precision == "int8" else 1_400_000,
            "accuracy": accuracy,
        },
        "device": {
            "at": None,
            "profile": None,
            "model": "board",
            "cpu": "CPU",
            "machine": "x86_64",
            "cores": 4,
            "usable_cores": 4,
            "governor": "performance",
            "memory_mb": 8000,
            "gpus": ["NVIDIA A10"],
            "runs_on": "CPU",
            "system": "Linux 6",
            "python": "3.11.2",
        },
        "runtime": {
            "versions": {target: "1.0"},
            "scan": {"value": "plugin", "reason": "installed"},
            "isa": "avx2",
            "plan": {},
            "nodes": {"CPUExecutionProvider": 12},
        },
        "settings": {
            "threads": 1,
            "batch": 1,
            "scan": "auto",
            "device": None,
            "cache": None,
            "cuda_graph": False,
            "streams": 1,
            "timed": "model",
            "limit_s": 60.0,
        },
        "date": "2026-11-25T10:00:00+00:00",
        "load_ms": {"fresh": 50.0, "again": 10.0},
        "first_ms": 2.0,
        "warm_up": 10,
        "stable": True,
        "samples_ms": samples,
        "summary_ms": Latency(tuple(samples), 10, True).summary(),
        "interval_ms": [median * (1 - spread), median * (1 + spread)],
        "device_ms": {},
        "layers": {},
        "energy_mj": {},
        "throughput": 1e3 / median,
        "memory_mb": {"before": 30.0, "peak": 80.0},
        "before": state,
        "after": state,
        "warnings": [],
        "schema_version": 1,
    }
    for section, values in (changes or {}).items():
        made[section] = {**made[section], **values}
    return deepcopy({**made, **fields})


def record(*args: Any, **kwargs: Any) -> Record:
    return Record.parse(content(*args, **kwargs), "test")


def written(folder: Path, *records: Record) -> Path:
    """The records as files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, each in enumerate(records):
        each.write(folder / f"{i}.json")
    return folder
