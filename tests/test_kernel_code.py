"""Kernels for instruction sets that this CPU may lack: the instructions in their code, and emulated instructions."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from evm_deploy.toolchain.compile import Compiler, parse_recipe
from tests import driver as drivers
from tests.driver import Driver, check_exact_int8_blocks, check_random_blocks, kernels_of_x86
from tests.test_native import library
from tests.toolchains import need

pytestmark = pytest.mark.compiler

YMM, ZMM, MASK, VNNI, HIGH = r"%ymm", r"%zmm", r"%k[0-7]", r"vpdp", r"%[xy]mm(1[6-9]|2\d|3[01])\b"
NEWER_THAN_SSE2 = (
    r"\t(v\w+|pshufb|phadd\w|pmulld|pblend\w+|blendv?p\w|ptest|pinsr[bdq]|pextr[bdq]|round[ps][sd]|dpp\w|hadd\w+)\s"
)
#: Kernel -> registers and instructions that its dispatch does not ask for.
FORBIDDEN = {
    "base": (YMM, ZMM, MASK, NEWER_THAN_SSE2),
    "avx2": (ZMM, MASK, VNNI, HIGH),
    "avxvnni": (ZMM, MASK, HIGH),
    "avx512": (VNNI,),
    "avx512vnni": (),
}
EMULATED_VNNI = """
#include <immintrin.h>
#define __AVXVNNI__ 1
static inline __m256i emulated(__m256i sum, __m256i bytes, __m256i weights) {
    const __m256i low = _mm256_set1_epi16(255), even = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_and_si256(bytes, low), even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), _mm256_srai_epi16(weights, 8)));
}
#define _mm256_dpbusd_avx_epi32 emulated
"""


@pytest.fixture(scope="module")
def compiler():
    need("g++")
    found = Compiler(("g++",), "x86_64")
    if "avx2" not in {kernel.name for kernel in parse_recipe(drivers.NATIVE).of(found.architecture)} or not avx2_runs():
        pytest.skip("the kernels of x86-64 are tested on x86-64 with AVX2")
    return found


def avx2_runs():
    found = library().evm_scan_force_isa(b"avx2")
    library().evm_scan_force_isa(None)
    return found


def test_no_kernel_uses_instructions_that_its_dispatch_does_not_ask_for(compiler, shared_folder):
    assert {kernel.name for kernel in parse_recipe(drivers.NATIVE).of("x86_64")} == set(FORBIDDEN)
    for isa, forbidden in FORBIDDEN.items():
        code = "".join(
            subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
            for path in kernels_of_x86(shared_folder).glob(f"{isa}-*.o")
        )
        assert code.count("\n") > 5000
        for pattern in forbidden:
            found = re.search(f".*{pattern}.*", code)
            assert not found, f"{isa}: {found[0]}"
        assert bool(re.search(VNNI, code)) == isa.endswith("vnni")
        assert bool(re.search(ZMM, code)) == isa.startswith("avx512")


def test_int8_blocks_of_avx_vnni_with_its_instruction_emulated(compiler, tmp_path):
    native = shutil.copytree(drivers.NATIVE, tmp_path / "native")
    (native / "vnni.h").write_text(EMULATED_VNNI)
    recipe = (native / "kernels.txt").read_text()
    lines = [line for line in recipe.splitlines() if not re.match(r"kernel x86_64 (avx512|avxvnni)", line)]
    lines = [f"{line} -include {native / 'vnni.h'}" if "x86_64 avx2 " in line else line for line in lines]
    (native / "kernels.txt").write_text("\n".join(lines))
    dispatch = (native / "scan" / "dispatch.cpp").read_text()
    kept = re.sub(r"EVM_KERNEL\((avx512vnni|avx512|avxvnni), [\w |,]+?\),\s*", "", dispatch)
    assert kept.count("EVM_KERNEL(") == dispatch.count("EVM_KERNEL(") - 3
    (native / "scan" / "dispatch.cpp").write_text(kept)
    driver = Driver((str(drivers.build_driver(compiler, tmp_path, ["-O1"], native=native)),)).forced("avx2")
    check_exact_int8_blocks(driver, 24)
    check_random_blocks(driver, 2)
