"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer on every instruction set, with any shape."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from evm_deploy.scan.reference import selective_scan
from evm_deploy.toolchain.compile import Compiler
from reliability import operators
from reliability.operators import CHECKED
from tests import driver as drivers
from tests.cache import once
from tests.driver import (
    Driver,
    any_block,
    any_int8_block,
    check_exact_int8_blocks,
    check_half_blocks,
    check_hard_scans,
    check_random_blocks,
    check_random_scans,
    scan_problem,
)
from tests.test_native import isas, random_scan
from tests.toolchains import need

pytestmark = pytest.mark.compiler

EDGES = [  # b, H, W, C, d, N, R, G: what random shapes rarely hit
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 1, 9, 3, 5, 65, 2, 2),
    (1, 9, 1, 17, 33, 64, 1, 1),
    (1, 2, 50, 16, 32, 16, 1, 2),
    (1, 49, 2, 15, 31, 129, 17, 3),
    (3, 7, 7, 40, 20, 8, 3, 5),
    (2, 13, 600, 3, 5, 2, 1, 1),  # maps of several groups of rows, here the fewest rows
    (1, 150, 3, 17, 30, 130, 2, 2),
    (1, 3, 0, 8, 16, 4, 1, 1),
    (1, 0, 3, 8, 16, 4, 1, 1),
    (0, 3, 3, 8, 16, 4, 1, 1),
    (1, 3, 3, 0, 16, 4, 1, 1),
    (1, 3, 3, 8, 16, 0, 0, 0),
]


@pytest.fixture(scope="module")
def compiler():
    if sys.platform != "linux":
        pytest.skip("the sanitizers are tested on Linux")
    need("g++")
    return Compiler(("g++",), "aarch64" if "neon" in isas() else "x86_64")


@pytest.fixture(scope="module")
def sanitized(compiler, shared_folder):
    folder = once(shared_folder / "sanitized", partial(operators.sanitized, "onnxruntime"))
    return next(folder.glob("*.so"))


@pytest.fixture(scope="module")
def driver(compiler, sanitized, shared_folder):
    """The driver, linked with the library: the kernels are compiled once."""

    def build(folder):
        flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", *CHECKED, f"-I{drivers.NATIVE / 'scan'}")
        path = f"-Wl,-rpath,{sanitized.parent}"
        compiler.run(*flags, drivers.SOURCE, sanitized, path, "-o", folder / "driver")

    return Driver((str(once(shared_folder / "asan", build) / "driver"),))


def test_every_kernel_is_clean_and_right(driver):
    g = np.random.default_rng(0)
    highs = (2, 14, 14, 40, 70, 70, 9, 6)
    sizes = [*EDGES, *(tuple(int(g.integers(1, high + 1)) for high in highs) for _ in range(60))]
    problems = [any_block(seed, *size) for seed, size in enumerate(sizes)]
    problems += [any_int8_block(seed, *size, x_proj=seed % 4 > 0) for seed, size in enumerate(sizes)]
    problems += [replace(any_block(seed, *size), op=4 + seed % 2) for seed, size in enumerate(sizes)]
    results = {}
    for isa in isas():
        check_random_scans(driver.forced(isa), 60)
        check_hard_scans(driver.forced(isa))
        check_random_blocks(driver.forced(isa), 10)
        check_exact_int8_blocks(driver.forced(isa), 6)
        check_half_blocks(driver.forced(isa), 6, isa)
        results[isa] = driver.forced(isa).run(problems)
    best = results[isas()[-1]]
    for isa, outputs in results.items():
        for problem, got, want in zip(problems, outputs, best, strict=True):
            for a, b in zip(got, want, strict=True):
                tolerance = 2e-5 if problem.op in (0, 1) else 0.05  # a value may be rounded to the next step
                assert np.abs(a - b).max(initial=0) <= tolerance * max(1.0, np.abs(b).max(initial=0)), (
                    isa,
                    problem.sizes,
                )


def test_a_write_out_of_bounds_is_seen(tmp_path, compiler):
    """The control: a kernel that stores whole vectors where a few lanes are left."""
    native = shutil.copytree(drivers.NATIVE, tmp_path / "native")
    simd = (native / "scan" / "simd.h").read_text()
    wrong = simd.replace("if (count >= LANES) return store(p, v);", "if (count) return store(p, v);")
    assert wrong != simd
    (native / "scan" / "simd.h").write_text(wrong)
    path = drivers.build_driver(compiler, tmp_path, ["-O0", "-Wno-error"], native=native)
    for problem, name in ((scan_problem(random_scan(0, 1, 1, 3, 5, 4)), "y"), (any_block(0, *EDGES[1]), "out")):
        with pytest.raises(AssertionError, match=f"exit 3: driver: written out of bounds: {name}"):
            Driver((str(path),)).run([problem])


SESSION = """
import sys, numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
options.intra_op_num_threads = 2
session = ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
print(len({session.run(None, {"image": pixels})[0].tobytes() for _ in range(5)}))
"""


def test_the_library_is_clean_inside_an_onnxruntime_session(sanitized, micro_bundle):
    command = [sys.executable, "-c", SESSION, str(sanitized), str(micro_bundle.path / "model.onnx")]
    run = subprocess.run(command, env=operators.environment(), capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "1\n"), run.stderr[-3000:]


def test_operators_compute_what_fits_and_refuse_the_rest(sanitized, tmp_path):
    """Briefly; `python -m reliability.operators` goes on for longer, and in OpenVINO."""
    result = operators.attempt("onnxruntime", sanitized, 600, 3, tmp_path)
    assert not result["findings"], result["findings"][:3]
    assert min(result["computed"], result["refused"]) > 200


def test_a_report_of_a_sanitizer_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(operators.sys, "executable", "false")
    (tmp_path / "last").write_text("problem 7")
    assert operators.attempt("onnxruntime", tmp_path, 1, 1, tmp_path)["findings"] == ["problem 7: exit 1: "]


def test_wrong_results_are_told():
    tame = next(
        p for p in operators.problems(0) if p.op == "SelectiveScan" and p.fits and p.tame and p.arrays["u"].size
    )
    right = selective_scan(*tame.arrays.values()).astype(np.float32)
    assert operators.wrong(tame, right) == ""
    assert operators.wrong(tame, right * np.float32(1.01)).startswith("off by")
    assert operators.wrong(tame, right[..., :1].astype(np.float64)).startswith("the output is float64")
    for name, said in (("u", "a NaN was lost"), ("bias", "a NaN became a number")):
        spoilt = np.full_like(tame.arrays[name], np.nan)
        assert operators.wrong(replace(tame, arrays={**tame.arrays, name: spoilt}), right) == said
