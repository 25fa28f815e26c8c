"""Fixtures of sweeps: a cache of the test's own, and the work of units without exporting and measuring."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from evm_deploy.bench import device
from evm_deploy.sweep import units as units_module
from tests.records import record as make_record

#: Median in ms by precision at 64x64 with 2 threads; a quarter at 32x32, twice with 1 thread.
P50 = {"fp32": 4.0, "fp16": 3.0, "w8": 4.5, "int8": 1.0}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def work(demo_bundle, own_cache, monkeypatch):
    """Units whose exports are copies of the demo's bundle and whose records are made up; a Counter of what was done."""
    done: Counter[str] = Counter()

    def export(source, plan, out, force):
        done[f"export {plan.precision} {plan.calib_method} {plan.smooth} {plan.sizes}".rstrip()] += 1
        path = Path(out) / f"evm_digits-onnx-{plan.precision}-{plan.sizes or '64x64'}"
        shutil.copytree(demo_bundle.path, path, dirs_exist_ok=True)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["plan"].update(imgsz=plan.imgsz or (64, 64), calib_method=plan.calib_method, smooth=plan.smooth)
        (path / "manifest.json").write_text(json.dumps({**manifest, "precision": plan.precision}))
        return replace(demo_bundle, path=path)

    def bench(bundle, settings):
        done[f"measure {bundle.name} {settings.threads}"] += 1
        precision, size = bundle.name.split("-")[2:]
        p50 = P50[precision] * (0.25 if size == "32x32" else 1) * (2 if settings.threads == 1 else 1)
        said = {**settings.as_dict(), "batch": settings.batch or 1}
        made = make_record(precision=precision, median=p50, device=device.facts(), settings=said)
        return replace(made, bundle={**made.bundle, "name": bundle.name, "accuracy": None})

    real = units_module.evaluated

    def evaluated(shard, cores, expected):
        done[f"evaluate {len(shard.items)}"] += 1
        return real(shard, cores, expected)

    real_float = units_module.FloatCheckpoint.evaluated

    def in_float(self, items):
        done[f"float {len(items)}"] += 1
        return real_float(self, items)

    monkeypatch.setattr(units_module, "export", export)
    monkeypatch.setattr(units_module, "evaluated", evaluated)
    monkeypatch.setattr(units_module.FloatCheckpoint, "evaluated", in_float)
    monkeypatch.setattr("evm_deploy.sweep.boards.bench", bench)
    return done


def count(work: Counter[str], kind: str) -> int:
    """Number of units of a kind that were done."""
    return sum(number for name, number in work.items() if name.startswith(kind))
