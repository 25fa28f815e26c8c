"""Versions of packages, whatever their distributions are called."""

from __future__ import annotations

import sys
from importlib import metadata

from evm_deploy._util.packages import package_versions


def test_versions_are_those_of_what_brings_a_module(tmp_path, monkeypatch):
    for module in ("evm_gizmo", "evm_gadget"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise ImportError('imported')")
    info = tmp_path / "evm_gizmo_gpu-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evm-gizmo-gpu\nVersion: 1.2\n")
    (info / "RECORD").write_text("evm_gizmo/__init__.py,,\n")
    (info / "top_level.txt").write_text("evm_gizmo\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = package_versions(["evm_gizmo", "evm_gadget", "evm_missing", "numpy"])
    assert found == {"evm_gizmo": "1.2", "evm_gadget": "unknown", "numpy": metadata.version("numpy")}
