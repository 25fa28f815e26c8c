"""Versions of packages, whatever their distributions are called."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from evm_deploy._util.packages import package_versions, version
from evm_deploy.bench.remote.ssh_host import COMMON, IMAGES
from evm_deploy.runtimes.registry import load_runtimes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


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


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ("evm_gizmo/__init__.py,,\n", "3.4"),
        ("METADATA,,\nevm_gizmo.cpython-311-x86_64-linux-gnu.so,,\n", "3.4"),
        ("evm_gizmo_more/__init__.py,,\nother/evm_gizmo/__init__.py,,\n", "unknown"),
    ],
)
def test_a_list_of_files_says_it_where_no_module_is_declared(tmp_path, monkeypatch, record, found):
    info = tmp_path / "evm_gizmo_gpu-3.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evm-gizmo-gpu\nVersion: 3.4\n")
    (info / "RECORD").write_text(record)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert version("evm_gizmo") == found


def oldest(lines, package):
    """The oldest version of a package that requirements allow; empty for any."""
    (bounds,) = ([(each.operator, each.version) for each in Requirement(line).specifier] for line in lines
                 if Requirement(line).name == package)  # fmt: skip
    return next((version for operator, version in bounds if operator in (">=", "==")), "")


@pytest.mark.parametrize("info", load_runtimes().values(), ids=list(load_runtimes()))
def test_a_runtime_needs_what_its_extra_brings(info):
    """The table for evm-doctor and boards says the same versions as pip's."""
    extra = PROJECT["optional-dependencies"][info.extra]
    assert {need.package: need.least for need in info.needs} == {
        need.package: oldest(extra, need.package) for need in info.needs
    }


def test_boards_need_what_the_package_does():
    assert all(oldest(PROJECT["dependencies"], need.package) == need.least for need in (*COMMON, IMAGES))
