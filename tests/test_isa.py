"""EVM_ISA: forces the instruction set of the native kernels in every runtime, and is an error if it cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from evm_deploy import plugin_path
from evm_deploy.bench.measurable import MeasuredBundle
from evm_deploy.bench.record import Settings
from evm_deploy.cli import doctor_main
from evm_deploy.errors import ToolchainError
from evm_deploy.scan import native
from evm_deploy.toolchain import plugins
from evm_deploy.toolchain.compile import read_recipe
from tests.driver import Driver, check_hard_scans, check_random_scans, driver_of_installed_kernels
from tests.test_native import isas
from tests.toolchains import need

NAMES = {kernel.name for kernel in read_recipe().kernels}

# One process for each value of EVM_ISA: a library reads it once. Each line: the instruction set in use, or the error.
ASK = """
import json, sys
from evm_deploy.errors import EvmError
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.runtimes.openvino import open_core
from evm_deploy.scan.native import open_kernel
from evm_deploy.toolchain import openvino_extension, plugins
from pathlib import Path

library, extension, model = map(Path, sys.argv[1:])
def said(use):
    try:
        return use()
    except EvmError as error:
        return error.args[0]
def opens(use, library):
    return said(lambda: (use(), plugins.kernel_isa(library))[1])
print(json.dumps({
    "library": said(lambda: plugins.kernel_isa(library)),
    "extension": said(lambda: openvino_extension.isa(extension)),
    "ONNX Runtime": opens(lambda: OnnxRuntime(model, 1, library), library),
    "OpenVINO": opens(lambda: open_core(extension), extension),
    "torch op": opens(lambda: open_kernel(library), library),
}))
"""


def ask(isa, model):
    """Return by runtime the instruction set in use under EVM_ISA=isa, or the error."""
    command = [sys.executable, "-c", ASK, plugin_path("onnxruntime"), plugin_path("openvino"), model]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "EVM_ISA": isa})
    return json.loads(done.stdout)


@pytest.mark.compiler
def test_every_runtime_uses_it(micro_bundle):
    assert set(ask(isas()[0], micro_bundle.path / "model.onnx").values()) == {isas()[0]}


@pytest.mark.compiler
def test_every_runtime_refuses_an_unknown_one(micro_bundle):
    for runtime, said in ask("mmx\xff", micro_bundle.path / "model.onnx").items():
        assert "EVM_ISA=mmx??: the library has no such instruction set; this CPU runs: " in said, runtime
        assert isas()[-1] in said, runtime


@pytest.mark.compiler
def test_a_cpu_that_lacks_it(tmp_path):
    """qemu's Haswell has AVX2 and no AVX-512: the kernel for AVX2 is used unless EVM_ISA names another one."""
    need("g++", "qemu")
    if "avx2" not in isas():
        pytest.skip("the kernels of x86-64 are tested on x86-64")
    haswell = Driver(("qemu-x86_64", "-cpu", "Haswell", str(driver_of_installed_kernels(tmp_path))))
    for isa in ("", "avx2", "base"):
        check_random_scans(haswell.forced(isa), 2)
        check_hard_scans(haswell.forced(isa))
    lacks = "EVM_ISA=avx512: this CPU lacks the instruction set; it runs: avx2, base"
    with pytest.raises(AssertionError, match=lacks):
        haswell.forced("avx512").run([])


def test_set_too_late_it_is_an_error(monkeypatch, capsys):
    """The library is loaded already: it cannot follow, and says so in place of computing with another one."""
    library = plugin_path("onnxruntime")
    before = plugins.kernel_isa(library)
    message = rf"EVM_ISA={isas()[0]}.* uses {before}(?s:.*)before the program starts"
    monkeypatch.setenv("EVM_ISA", isas()[0])
    native.open_kernel.cache_clear()
    for use in (plugins.kernel_isa, native.open_kernel):
        with pytest.raises(ToolchainError, match=message):
            use(library)
    assert doctor_main([]) == 0
    assert f"uses {before}" in capsys.readouterr().out
    monkeypatch.setenv("EVM_ISA", before)
    assert plugins.kernel_isa(library) == before
    assert doctor_main([]) == 0
    assert f"{before} (forced by EVM_ISA)" in capsys.readouterr().out
    assert doctor_main(["--json"]) == 0
    kernel = json.loads(capsys.readouterr().out)["kernel"]
    assert (kernel["isa"], kernel["forced"], kernel["hint"]) == (before, before, "")


@pytest.mark.parametrize("scan", ["plugin", "portable"])
def test_records_name_it(scan, micro_bundle):
    with MeasuredBundle(micro_bundle.path, Settings(scan=scan)) as measured:
        isa = measured.runtime()["isa"]
    assert isa == (isas()[-1] if scan == "plugin" else None) and {isa} <= NAMES | {None}
