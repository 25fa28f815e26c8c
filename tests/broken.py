"""Bundles broken in every way that an app can meet: what Python says of them is what every SDK says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        file = bundle / "manifest.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        file.write_text(json.dumps(content), encoding="utf-8")

    return edit


def _artifact(bundle: Path) -> Path:
    content = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return bundle / str(content["artifact"])


def _truncate(bundle: Path) -> None:
    file = _artifact(bundle)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(bundle: Path) -> None:
    file = _artifact(bundle)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _escape(content: dict[str, Any]) -> None:
    content["files"]["../outside"] = {"sha256": "0" * 64, "size_bytes": 1}


def _bad_hash(content: dict[str, Any]) -> None:
    content["files"][content["artifact"]]["sha256"] = "none"


def _reject(content: dict[str, Any]) -> None:
    content["rejected"] = True
    content["parity"]["failures"] = ["logits: off by 1", "scan: off by 2"]


# name -> what breaks a copy of a good bundle
BROKEN: dict[str, Callable[[Path], object]] = {
    "gone": shutil.rmtree,
    "no manifest": lambda bundle: (bundle / "manifest.json").unlink(),
    "manifest cut": lambda bundle: (bundle / "manifest.json").write_text('{"schema_version": 1, "na'),
    "manifest is a list": lambda bundle: (bundle / "manifest.json").write_text("[]"),
    "manifest without version": _manifest(lambda content: content.pop("schema_version")),
    "manifest of the future": _manifest(lambda content: content.update(schema_version=2)),
    "manifest without artifact": _manifest(lambda content: content.update(artifact="else.onnx")),
    "a name that leaves": _manifest(_escape),
    "no hash": _manifest(_bad_hash),
    "rejected": _manifest(_reject),
    "not built": _manifest(lambda content: content.update(built=False)),
    "size of nothing": _manifest(lambda content: content["preprocessing"].update(size=[0, 64])),
    "crop of nothing": _manifest(lambda content: content["preprocessing"].update(crop_pct=0)),
    "unknown interpolation": _manifest(lambda content: content["preprocessing"].update(interpolation="lanczos")),
    "no deviation": _manifest(lambda content: content["preprocessing"].update(std=[0.1, 0.0, 0.1])),
    "artifact missing": lambda bundle: _artifact(bundle).unlink(),
    "artifact cut": _truncate,
    "one bit": _flip,
    "labels changed": lambda bundle: (bundle / "labels.txt").write_text("other\n"),
}
