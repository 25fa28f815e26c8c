"""Kernels for instruction sets that this CPU may lack: the instructions in their code, emulated ones, a benchmark."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

import pytest

from evm_deploy.toolchain.compile import Compiler, parse_recipe, read_recipe
from tests import driver as drivers
from tests.driver import Driver, check_exact_int8_blocks, check_random_blocks
from tests.test_native import library
from tests.toolchains import need

pytestmark = pytest.mark.compiler

#: Kernel -> extensions of x86-64, in the assembler's words, that its dispatch asks for.
EXTENSIONS = {
    "base": [],
    "avx2": ["avx2", "fma"],
    "avxvnni": ["avx2", "fma", "avx_vnni"],
    "avx512": ["avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl"],
    "avx512vnni": ["avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"],
    "avx512bf16": ["avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"],
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


def installed_code():
    """(name, instructions) of each object of the installed kernels, with "dispatch" for what chooses among them.

    Jumps, calls and padding are left out, addresses too: what remains can be assembled by itself.
    """
    archive = read_recipe().archive("x86_64")
    assert archive, "the package was installed without a compiler, or of other sources"
    dump = ["objdump", "--disassemble", "--no-show-raw-insn", archive]
    listing = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    for part in listing.split("file format")[1:]:
        name = re.search(r"<evm_(?:scan_rows|block_pack)_(\w+)>:", part)
        found = {re.sub(r"\s*(#|<).*", "", line) for line in re.findall(r"^ +[0-9a-f]+:\t(.*)", part, re.MULTILINE)}
        code = sorted(line for line in found if not re.match(r"(j|call|nop|data16|cs nop|xchg +%ax,%ax|xgetbv)", line))
        if code:
            yield name[1] if name else "dispatch", code


def refused(code, extensions):
    """The instructions that plain x86-64 with these extensions lacks."""
    command = ["as", f"-march={'+'.join(['generic64', *extensions])}", "-o", "/dev/null", "-"]
    text = "".join(f"{line}\n" for line in code)
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if re.search(r":\d+: Error: ", line)]
    assert errors or done.returncode == 0, done.stderr  # such as an extension that the assembler does not know
    return errors


def test_no_kernel_uses_instructions_that_its_dispatch_does_not_ask_for(compiler):
    assert {kernel.name for kernel in parse_recipe(drivers.NATIVE).of("x86_64")} == set(EXTENSIONS)
    seen = Counter()
    for name, code in installed_code():
        extensions = EXTENSIONS.get(name, [])
        assert refused(code, extensions) == [], name
        assert not extensions or refused(code, []), name
        seen[name] += len(code)
    assert set(seen) == {*EXTENSIONS, "dispatch"} and min(seen[name] for name in EXTENSIONS) > 2000


def test_kernels_use_the_products_that_they_are_for_and_no_other_has_them(compiler):
    """Blocks alone: their scans are those of other kernels."""
    own = {"avxvnni": "vpdpbusd", "avx512vnni": "vpdpbusd", "avx512bf16": "vdpbf16ps"}
    products = own | dict.fromkeys(("avx2", "avx512"), "vpmaddubsw")  # of weights of 7 bits
    kinds = re.compile(r"\bv(pdpbusd|dpbf16|pmaddubsw)")
    code = {name: [line for line in code if kinds.search(line)] for name, code in installed_code()}
    assert {name for name, found in code.items() if found} == set(products)
    for name, product in products.items():
        assert all(product in line for line in code[name])
        if name in own:
            assert len(refused(code[name], EXTENSIONS[name][:-1])) == len(code[name])


@pytest.mark.parametrize(
    "instruction", ["pmaxsd %xmm0, %xmm1", "movshdup %xmm0, %xmm1", "popcnt %eax, %eax", "vaddps %ymm0, %ymm1, %ymm2"]
)
def test_the_assembler_refuses_what_is_newer_than_x86_64(instruction, compiler):
    (error,) = refused(["addps %xmm0, %xmm1", instruction], [])
    assert instruction.split()[0] in error and "2:" in error


def test_int8_blocks_of_avx_vnni_with_its_instruction_emulated(compiler, tmp_path):
    native = shutil.copytree(drivers.NATIVE, tmp_path / "native")
    (native / "vnni.h").write_text(EMULATED_VNNI)
    recipe = (native / "kernels.txt").read_text()
    lines = [line for line in recipe.splitlines() if not re.match(r"kernel x86_64 (avx512|avxvnni)", line)]
    lines = [f"{line} -include {native / 'vnni.h'}" if "x86_64 avx2 " in line else line for line in lines]
    (native / "kernels.txt").write_text("\n".join(lines))
    dispatch = (native / "scan" / "dispatch.cpp").read_text()
    kept = re.sub(r"EVM_KERNEL\((avx512bf16|avx512vnni|avx512|avxvnni), [\w |,]+?\),\s*", "", dispatch)
    assert kept.count("EVM_KERNEL(") == dispatch.count("EVM_KERNEL(") - 4
    (native / "scan" / "dispatch.cpp").write_text(kept)
    driver = Driver((str(drivers.build_driver(compiler, tmp_path, ["-O1"], native=native)),)).forced("avx2")
    check_exact_int8_blocks(driver, 24)
    check_random_blocks(driver, 2)


def test_the_benchmark_of_matrix_products_compiles(compiler):
    recipe = parse_recipe(drivers.NATIVE)
    source = drivers.NATIVE.parent / "benchmarks" / "matrix_products.cpp"
    flags = [*recipe.words["flags"], "-Werror", *(f"-I{drivers.NATIVE / path}" for path in recipe.words["include"])]
    for kernel in recipe.of("x86_64"):
        if kernel.name in ("base", "avx2", "avx512"):  # those that the benchmark measures
            compiler.run(*flags, *kernel.arguments, "-fsyntax-only", source)
