"""Instructions of the scan for one state and step, counted: a busy machine does not change the figures.

The counts for aarch64 are in test_cross.py, which has the library.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

import pytest

from evm_deploy import plugin_path
from evm_deploy.toolchain.compile import Compiler
from tests import driver as drivers
from tests.driver import scan_problem
from tests.test_native import isas, random_scan
from tests.toolchains import need

D = 48  # one tile
KERNEL = "evm_scan_run_tile"
#: Most instructions for a state-step by instruction set and N: g++ 12's, counted on 2026-11-30, and 5 % more.
LIMITS = {("avx2", 16): 2.95, ("avx2", 8): 3.46, ("avx2", 1): 10.9, ("base", 16): 9.70, ("base", 1): 29.4}
#: The same for NEON, by N: zig's, and those of the driver itself.
NEON_LIMITS = {16: 6.34, 1: 23.5}


def problem(length: int, states: int) -> bytes:
    """Return a scan of one tile as input of the driver."""
    return scan_problem(random_scan(0, 1, 1, length, D, states, spread=0.1)).to_bytes()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Return the driver, linked with the installed library."""
    need("g++", "valgrind")
    path, library = tmp_path_factory.mktemp("driver") / "driver", plugin_path("onnxruntime")
    include = f"-I{drivers.NATIVE / 'scan'}"
    Compiler(("g++",), "").run(
        "-std=c++17", include, drivers.SOURCE, library, f"-Wl,-rpath,{library.parent}", "-o", path
    )
    return path


def counted_by_callgrind(program, isa: str, states: int, length: int = 160) -> float:
    """Return the instructions of the kernel for each state and step."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", f"--toggle-collect={KERNEL}", program]
    done = subprocess.run(
        command, input=problem(length, states), capture_output=True, check=True, env={**os.environ, "EVM_ISA": isa}
    )
    return int(re.search(rb"Collected : (\d+)", done.stderr)[1]) / (length * D * states)


@pytest.mark.valgrind
@pytest.mark.parametrize(("isa", "states"), LIMITS)
def test_on_x86(isa, states, program):
    if isa not in isas():
        pytest.skip(f"{isa} is not run on this CPU")
    count = counted_by_callgrind(program, isa, states)
    assert 0.8 * LIMITS[isa, states] < count < LIMITS[isa, states]


def counted_by_qemu(command: Sequence[str], log, states: int, lengths: tuple[int, int] = (8, 40)) -> float:
    """Return the instructions for each state and step: a difference, because those of a whole process are counted."""
    counts = []
    for length in lengths:
        qemu, *rest = command
        flags = ["-singlestep", "-d", "exec,nochain", "-D", str(log)]
        subprocess.run([qemu, *flags, *rest], input=problem(length, states), capture_output=True, check=True)
        counts.append(sum(line.startswith(b"Trace") for line in log.open("rb")))
    return (counts[1] - counts[0]) / ((lengths[1] - lengths[0]) * D * states)
