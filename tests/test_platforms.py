"""Bundles in the stock runtimes of other platforms, under qemu and wine: `python -m tests.platforms setup NAME`."""

from __future__ import annotations

import shutil

import pytest

from evm_deploy.bundle.archive import write_zip
from evm_deploy.export.plan import ExportPlan
from tests.platforms.roots import ROOTS, RUN
from tests.toolchains import need

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


def test_openvino_for_aarch64(micro, bundle_of):
    bundle = bundle_of(micro, ExportPlan("openvino", imgsz=(32, 32), scan="portable"))
    assert "ran as portable" in selftest("linux-aarch64", bundle.path)


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("scan", ["bundled", "portable"])
def test_onnx_runtime_for_windows(scan, form, onnx_bundle, tmp_path):
    bundle = onnx_bundle("windows-x86_64").path
    if form == "zip":
        bundle = write_zip(shutil.copytree(bundle, tmp_path / "bundle"))
    printed = selftest("windows-x86_64", bundle, "--scan", scan)
    assert ("native kernel" if scan == "bundled" else "ran as portable") in printed
    assert not list((ROOTS["windows-x86_64"].folder / "prefix").glob("drive_c/users/*/Temp/evm-bundle-*"))
