"""Bundles broken in every way that an app can meet: every SDK raises errors of the kind, code and place of Python's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evm_deploy.bundle.selftest import INPUT_FILE as TEST_INPUTS
from evm_deploy.bundle.selftest import SCAN_FILE as SCANS
from evm_deploy.errors import EvmError
from reliability.readers import rehash


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


def _reject(content: dict[str, Any]) -> None:
    content["rejected"] = True
    content["parity"]["failures"] = ["logits: off by 1", "scan: off by 2"]


def _labels(content: bytes) -> Callable[[Path], None]:
    def replace(bundle: Path) -> None:
        (bundle / "labels.txt").write_bytes(content)
        rehash(bundle, "labels.txt")

    return replace


def _tensor(file: str, end: str, function: Callable[[Any], Any]) -> Callable[[Path], None]:
    """The first tensor of a self-test's file whose name ends so, as `function` changes it; None leaves it out."""

    def edit(bundle: Path) -> None:
        path = bundle / "selftest" / file
        tensors = load_file(path)
        name = min(key for key in tensors if key.endswith(end))
        value = function(tensors.pop(name))
        save_file(tensors if value is None else {**tensors, name: np.ascontiguousarray(value)}, path)
        rehash(bundle, f"selftest/{file}")

    return edit


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the manifest of a bundle in place; returns the bundle."""
    _manifest(change)(bundle)
    return bundle


def changed_manifest(bundle: Path, copy: Path, case: dict[str, Any]) -> Path:
    """A bundle's manifest in a folder of its own, changed as a case of sdk/vectors says."""

    def change(content: dict[str, Any]) -> None:
        *path, key = case["at"]
        for each in path:
            content = content[each]
        content[key] = case.get("value")
        if "value" not in case:
            del content[key]

    copy.mkdir(parents=True)
    shutil.copy(bundle / "manifest.json", copy)
    return change_manifest(copy, change)


def refusal(act: Callable[[], object]) -> tuple[str, str, str]:
    """Kind, code and place of the error that is raised."""
    with pytest.raises(EvmError) as raised:
        act()
    return type(raised.value).__name__, raised.value.code, raised.value.where


def other_limits(content: dict[str, Any]) -> None:
    """Give the self-test limits that no reader would compute; its outputs fail with theirs."""
    limits = content["selftest"]
    limits.update(preprocessing=2.5, scans=dict.fromkeys(limits["scans"], 0.25), outputs={"logits": 0})


def no_limits(content: dict[str, Any]) -> None:
    """Make a manifest one from before limits were data."""
    del content["selftest"]


# name -> what breaks a copy of a good bundle
BROKEN: dict[str, Callable[[Path], object]] = {
    "gone": shutil.rmtree,
    "no manifest": lambda bundle: (bundle / "manifest.json").unlink(),
    "manifest cut": lambda bundle: (bundle / "manifest.json").write_text('{"schema_version": 1, "na'),
    "manifest is a list": lambda bundle: (bundle / "manifest.json").write_text("[]"),
    "a name that leaves": _manifest(_escape),
    "rejected": _manifest(_reject),
    "not built": _manifest(lambda content: content.update(built=False)),
    "artifact missing": lambda bundle: _artifact(bundle).unlink(),
    "artifact cut": _truncate,
    "one bit": _flip,
    "labels changed": lambda bundle: (bundle / "labels.txt").write_text("other\n"),
    "labels are no text": _labels(b"\xff\xfe" * 10),
    "too few labels": _labels(b"cat\ndog\n"),
    "another output": _manifest(lambda content: content["outputs"][0].update(name="scores")),
    "another input size": _manifest(lambda content: content["inputs"][0].update(shape=[1, 32, 32, 3])),
}

# name -> what leaves no self-test in a copy of a good bundle
NO_SELF_TEST: dict[str, Callable[[Path], object]] = {
    "no pixels": _tensor(TEST_INPUTS, "pixels", lambda pixels: None),
    "pixels of another size": _tensor(TEST_INPUTS, "pixels", lambda pixels: pixels[1:]),
    "no images": _tensor(TEST_INPUTS, "image", lambda images: None),
    "images of nothing": _tensor(TEST_INPUTS, "image", lambda images: images[:0]),
    "no outputs": _tensor(TEST_INPUTS, "logits", lambda logits: None),
    "outputs of other classes": _tensor(TEST_INPUTS, "logits", lambda logits: logits[:, 1:]),
    "outputs of other images": _tensor(TEST_INPUTS, "logits", lambda logits: logits[1:]),
    "a scan without A": _tensor(SCANS, ":A", lambda A: None),
    "a scan of other steps": _tensor(SCANS, ":B", lambda B: B[:, :, 1:]),
    "a scan without axes": _tensor(SCANS, ":u", lambda u: u.reshape(-1)),
}
