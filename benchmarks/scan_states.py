"""Measure the native scan kernel by number of states N and instruction set, in ns a state-step (least CPU time).

    python benchmarks/scan_states.py [--rounds 20] [--length 784] [--directions 4] [--library FILE]

The last line of an instruction set is a scan of one state whose delta is dt already: the difference is softplus alone.

A state-step advances one state of one channel by one step of L. The scan is D 96, batch 1, float32, one thread, without
a runtime. With four directions u, delta and y take 3.6 MB at L 784, with one 0.9 MB, which an L2 cache may hold. All N
of an instruction set run in turn, so that a change of the machine's speed affects all of them.

The lower bound is in multiplications and multiply-adds: nine for each state and step (five for exp, dt A, dt u B, h,
y), and seventeen for each channel and step (softplus: one to scale, five for exp, nine for the logarithm; dt u, skip
u), at the rate of a pure multiply-add loop on this core (fma_peak.cpp). So one state a channel needs 26 a state-step,
and sixteen need 10.1: a ratio of 2.6.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path

import numpy as np
from common import interleave, where
from scan import ISAS, fma_peak

from evm_deploy.runtimes.registry import plugin_path
from evm_deploy.scan.native import Arguments, open_kernel

D = 96
STATES = (1, 2, 4, 8, 16)
PER_STATE, PER_CHANNEL = 9, 17  # multiplications or multiply-adds


class Scan:
    """A scan of K directions, L steps and N states; calling it runs all its tiles. softplus: if false, delta is dt."""

    def __init__(self, kernel: ctypes.CDLL, K: int, L: int, states: int, softplus: bool = True) -> None:
        g = np.random.default_rng(0)
        shapes = ((1, K, L, D), (1, K, L, D), (K, D, states), (1, K, L, states), (1, K, L, states), (K, D), (K, D))
        arrays = [g.standard_normal(shape).astype(np.float32) for shape in shapes]
        arrays[1] -= 3  # dt from 0.001 to 1, as in trained networks
        if not softplus:
            arrays[1] = np.logaddexp(0, arrays[1], dtype=np.float32)
        arrays[2] = -np.exp(arrays[2])
        self.arrays = [*arrays, np.empty_like(arrays[0])]
        self.arguments = Arguments(*(a.ctypes.data for a in self.arrays), 1, K, L, D, states, not softplus)
        self.kernel, self.address = kernel, ctypes.addressof(self.arguments)
        self.tiles = kernel.evm_scan_num_tiles(self.address)

    def __call__(self) -> None:
        for tile in range(self.tiles):
            self.kernel.evm_scan_run_tile(self.address, tile)


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--length", type=int, default=784, help="steps L of the scan")
    parser.add_argument("--directions", type=int, default=4, help="directions K of the scan")
    parser.add_argument("--library", type=Path, help="native library to measure (default: the installed one)")
    args = parser.parse_args()
    K, L = args.directions, args.length
    kernel = open_kernel(args.library or plugin_path("onnxruntime"))
    scans = {f"{n}": Scan(kernel, K, L, n) for n in STATES} | {"no softplus": Scan(kernel, K, L, 1, softplus=False)}
    print(f"{where()}\nL {L}, K {K}, D {D}, float32, one thread, {args.rounds} rounds")
    for isa in ("base", "avx2", "avx512"):
        if not kernel.evm_scan_force_isa(ctypes.c_char_p(isa.encode())):
            continue
        times = interleave(scans, args.rounds, clock=time.thread_time)
        per_step = {n: min(times[str(n)]) * 1e6 / (L * K * D * n) for n in STATES}
        peak = max((fma_peak(*ISAS[isa]) or 0) for _ in range(3))
        for n in STATES:
            floor = f", {per_step[n] * peak / (PER_STATE + PER_CHANNEL / n):.2f}x its multiply-adds" if peak else ""
            ratio = per_step[n] / per_step[16]
            print(f"{isa:<7} N {n:<3} {per_step[n]:.3f} ns a state-step, {ratio:.2f}x N 16{floor}")
        without = min(times["no softplus"]) * 1e6 / (L * K * D)
        print(f"{isa:<7} N 1   {without:.3f} ns without softplus, which takes {per_step[1] - without:.3f} ns")
    kernel.evm_scan_force_isa(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
