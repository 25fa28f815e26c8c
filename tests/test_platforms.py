"""Bundles in the stock runtimes of other platforms, under qemu and wine: `python -m tests.platforms setup NAME`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.export.plan import ExportPlan
from evm_deploy.toolchain import cross_compile
from tests.broken import change_manifest, rehash
from tests.platforms.macos import for_linux
from tests.platforms.roots import PROJECT, ROOTS, RUN
from tests.toolchains import AARCH64_GXX, MINGW, need

SDK, APP = PROJECT / "sdk" / "cpp", PROJECT / "tests" / "platforms" / "app.cpp"
pytestmark = [pytest.mark.xdist_group("cross"), pytest.mark.cross]


def selftest(name, *arguments, **environment):
    """Return what evm-run --selftest printed on a platform, which must have passed."""
    need(f"root of {name}")
    done = ROOTS[name].run("-c", RUN, *arguments, "--selftest", "--threads", "1", **environment)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def onnx_bundle(micro, bundle_of):
    """onnx_bundle(platform) -> a bundle with the native library for it."""
    return lambda platform: bundle_of(micro, ExportPlan("onnx", imgsz=(32, 32), native_library=platform))


@pytest.mark.parametrize(("cpu", "scan"), [("cortex-a53", "bundled"), ("cortex-a72", "portable")])
def test_onnx_runtime_for_aarch64(cpu, scan, onnx_bundle):
    printed = selftest("linux-aarch64", onnx_bundle("linux-aarch64").path, "--scan", scan, QEMU_CPU=cpu)
    assert ("native kernel, neon, from the bundle" if scan == "bundled" else "ran as portable") in printed


def test_the_code_for_macos_in_onnx_runtime_for_aarch64(onnx_bundle, tmp_path):
    """Arm64 Macs and Linux on arm64 call functions alike, so that the library's own code runs without a Mac.

    zig compiles for Macs as for the M1, the first of them. A Cortex-A76 can stand in for it, an A72 cannot."""
    need("LIEF", "root of linux-aarch64")
    library = for_linux(cross_compile.library("onnxruntime", "macos-arm64"), tmp_path)
    bundle = shutil.copytree(onnx_bundle("linux-aarch64").path, tmp_path / "bundle")
    name = Manifest.read(bundle).plugins["linux-aarch64"]
    shutil.copy(library, bundle / name)
    rehash(bundle, name)
    printed = selftest("linux-aarch64", bundle, "--scan", "bundled")
    assert "native kernel, fp16, from the bundle" in printed


def test_openvino_for_aarch64(micro, bundle_of):
    bundle = bundle_of(micro, ExportPlan("openvino", imgsz=(32, 32), scan="portable"))
    assert "ran as portable" in selftest("linux-aarch64", bundle.path)


def test_the_openvino_extension_for_aarch64(micro, bundle_of, tmp_path):
    """Compile it as a board does, with g++ and OpenVINO's CMake package, in place of the bundle's for this system."""
    need("g++ for aarch64", "root of linux-aarch64")
    openvino = ROOTS["linux-aarch64"].folder / "site" / "openvino"
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={AARCH64_GXX}")
    command = ("cmake", "-S", PROJECT / "native", "-B", tmp_path / "build", "-DCMAKE_BUILD_TYPE=Release", *target)
    subprocess.run([*command, "-DEVM_OPENVINO=ON", f"-DOpenVINO_DIR={openvino / 'cmake'}"], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build", "--target", "evm_openvino"], check=True)
    made = bundle_of(micro, ExportPlan("openvino", imgsz=(32, 32), scan="plugin"))
    bundle = shutil.copytree(made.path, tmp_path / "bundle")
    (library,) = made.manifest.plugins.values()
    shutil.copy(tmp_path / "build" / "evm_openvino.so", bundle / library)
    change_manifest(bundle, lambda content: content["scan"].update(plugins={"linux-aarch64": library}))
    rehash(bundle, library)
    printed = selftest("linux-aarch64", bundle, "--scan", "bundled", QEMU_CPU="cortex-a72")
    assert "native kernel, neon, from the bundle" in printed


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("scan", ["bundled", "portable"])
def test_onnx_runtime_for_windows(scan, form, onnx_bundle, tmp_path):
    bundle = onnx_bundle("windows-x86_64").path
    if form == "zip":
        bundle = write_zip(shutil.copytree(bundle, tmp_path / "bundle"))
    printed = selftest("windows-x86_64", bundle, "--scan", scan)
    assert ("native kernel" if scan == "bundled" else "ran as portable") in printed
    assert not list((ROOTS["windows-x86_64"].folder / "prefix").glob("drive_c/users/*/Temp/evm-bundle-*"))


@pytest.fixture(scope="module")
def windows_app(tmp_path_factory):
    """The program app.cpp with the C++ SDK, for Windows. zig compiles its runtimes once: minutes."""
    need("root of windows-x86_64", "zlib for MinGW")
    root = ROOTS["windows-x86_64"]
    include, made = tmp_path_factory.mktemp("include"), root.folder / "cpp" / "app.exe"
    for header in (MINGW / "include" / "zlib.h", MINGW / "include" / "zconf.h", Path("/usr/include/nlohmann")):
        (include / header.name).symlink_to(header)
    sources = [each for each in SDK.glob("src/*.cpp") if each.stem not in ("openvino", "tensorrt")]
    defined = ("EVM_ZLIB=1", "EVM_ONNXRUNTIME=1", 'EVM_ONNXRUNTIME_LIBRARY=""', 'EVM_VERSION="0"')
    flags = ("-std=c++17", "-O1", f"-I{include}", f"-I{SDK / 'include'}", *(f"-D{each}" for each in defined))
    compiler = cross_compile.zig_compiler("x86_64-windows-gnu", "x86_64", made.parent / "zig")
    compiler.run(*flags, *sources, APP, MINGW / "lib" / "libz.a", "-o", made)
    return made


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_the_cpp_sdk_for_windows(form, windows_app, onnx_bundle, tmp_path):
    """Also under a name outside the ANSI code page. A library from a zip stays, as one file for all runs."""
    root = ROOTS["windows-x86_64"]
    runtime = root.path(root.folder / "site" / "onnxruntime" / "capi" / "onnxruntime.dll")
    bundle = shutil.copytree(onnx_bundle("windows-x86_64").path, tmp_path / "街")
    bundle = write_zip(bundle) if form == "zip" else bundle
    pixels = (np.arange(64 * 96 * 3) * 7 + 13).astype(np.uint8).reshape(64, 96, 3)
    with load(onnx_bundle("windows-x86_64").path, scan="portable") as model:
        (want,) = model.predict(pixels, top=3)
    for scan in ("bundled", "portable", "bundled"):
        done = root.program(windows_app, f"{root.path(bundle)}\n{scan}\n", EVM_ONNXRUNTIME=runtime)
        assert done.returncode == 0, done.stdout + done.stderr
        *found, lowering = done.stdout.splitlines()
        assert [int(line.split()[0]) for line in found] == [each.index for each in want]
        assert [float(line.split()[1]) for line in found] == pytest.approx([each.score for each in want], abs=1e-4)
        assert ("native kernel" if scan == "bundled" else "portable: as requested") in lowering
    left = list((root.folder / "prefix").glob("drive_c/users/*/Temp/evm-library-*"))
    assert not [path for path in left if path.suffix != ".dll"]
