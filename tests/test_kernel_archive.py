"""The archive of compiled kernels: what is compiled at its first use links it, if sources and flags are the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from evm_deploy.scan import reference
from evm_deploy.toolchain import executorch_library
from evm_deploy.toolchain.compile import Compiler, parse_recipe, read_recipe
from evm_deploy.toolchain.platforms import PLATFORMS, host_platform
from evm_deploy.toolchain.plugins import find_plugin
from reliability.operators import CHECKED
from tests.test_native import isas, magnitudes, opened, random_scan, run_scan
from tests.toolchains import need

KNOWN = PLATFORMS.get(host_platform())
ARCHITECTURE = KNOWN.architecture if KNOWN else "other"
KERNELS = {"scan.cpp", "block.cpp", "dispatch.cpp"}


@pytest.fixture
def installed(tmp_path):
    """A copy of the installed recipe and archive."""
    if find_plugin("onnxruntime") is None:
        pytest.skip("the package was installed without a compiler")
    recipe, archive = read_recipe(), read_recipe().archive(ARCHITECTURE)
    assert archive, "CMake and Recipe.archive give the archive different names, or the install is old"
    (tmp_path / "lib").mkdir()
    shutil.copy(archive, tmp_path / "lib")
    return parse_recipe(shutil.copytree(recipe.folder, tmp_path / "native"))


def test_the_archive_is_found_with_its_sources_alone(installed):
    assert installed.archive(ARCHITECTURE) == next((installed.folder.parent / "lib").iterdir())
    assert installed.archive("another") is installed.archive(ARCHITECTURE, "-g") is None
    with (installed.folder / "openvino" / "extension.cpp").open("a") as file:
        file.write("// no kernel\n")
    assert installed.archive(ARCHITECTURE)


@pytest.mark.parametrize("name", ["scan/scan.cpp", "scan/dispatch.cpp", "scan/gemm.h", "kernels.txt", "CMakeLists.txt"])
def test_an_archive_of_other_sources_is_not_found(name, installed):
    with (installed.folder / name).open("a") as file:
        file.write("\n")
    assert installed.archive(ARCHITECTURE) is None


@pytest.mark.parametrize("kernels", ["of the archive", "of newer sources", "with sanitizers"])
@pytest.mark.compiler
def test_cmake_compiles_the_kernels_unless_the_archive_is_of_their_sources_and_flags(kernels, installed, tmp_path):
    need("cmake")
    environment = dict(os.environ)
    environment.pop("CXXFLAGS", None)
    if kernels == "of newer sources":
        with (installed.folder / "scan" / "block.cpp").open("a") as file:
            file.write("// newer\n")
    elif kernels == "with sanitizers":
        environment["CXXFLAGS"] = " ".join(CHECKED)
    build, run = tmp_path / "build", {"check": True, "capture_output": True, "env": environment}
    subprocess.run(["cmake", "-S", installed.folder, "-B", build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"], **run)
    commands = json.loads((build / "compile_commands.json").read_text())
    compiled = {Path(command["file"]).name for command in commands}
    adapters = {"library.cpp", "scan_op.cpp", "block_op.cpp"}
    if kernels != "of the archive":
        assert compiled == adapters | KERNELS
        return
    assert compiled == adapters
    subprocess.run(["cmake", "--build", build], **run)
    linked = opened(build / find_plugin("onnxruntime").name)
    inputs = random_scan(0, 1, 4, 9, 5, 16)
    want, terms = reference.selective_scan(*inputs), reference.selective_scan(*magnitudes(*inputs))
    for isa in isas():
        assert linked.evm_scan_force_isa(isa.encode())
        assert np.abs(run_scan(linked, inputs) - want).max() <= 3e-6 * terms.max()


@pytest.mark.parametrize("flags, has_archive", [("", True), (" -O1", False)])
def test_executorch_links_the_archive_unless_the_compiler_has_flags(
    flags, has_archive, installed, tmp_path, monkeypatch
):
    need("ExecuTorch")
    commands = []
    monkeypatch.setenv("CXX", f"c++{flags}")
    monkeypatch.setattr(executorch_library, "read_recipe", lambda: installed)
    monkeypatch.setattr(Compiler, "run", lambda self, *arguments: commands.append(arguments))
    executorch_library.compile_in(tmp_path)
    compiled = {argument.name for command in commands if "-c" in command for argument in command if is_source(argument)}
    adapters = {"ops.cpp", "program.cpp"}
    assert compiled == (adapters if has_archive else adapters | KERNELS)
    assert (installed.archive(ARCHITECTURE) in commands[-1]) is has_archive


def is_source(argument):
    return getattr(argument, "suffix", "") == ".cpp"
