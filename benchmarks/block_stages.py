"""Measure the stages of a fused EVSS block against their multiply-adds, float32 and int8, by instruction set.

    python benchmarks/block_stages.py [--variant tiny] [--isa avx2] [--rounds 200] [--library FILE] [--weight-bits 7]

The blocks are those of the variant's scan stages at 224x224, batch 1, in ONNX Runtime on one thread, with random
weights. A stage's time is the least of all rounds, by the CPU's constant counter, so that other work on the machine
adds little. In brackets: multiples of the time of the stage's multiply-adds at the rate of a loop with nothing else on
the same core (fma_peak.cpp). int8 products count 1/4 (VNNI) or 1/2 (pairs of 16-bit products); an activation counts
its exponential and its polynomial, a state-step nine, a LayerNorm none.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from common import where

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scan import ISAS, fma_peak

from evm_deploy.calib.quantize import LARGEST_WEIGHT
from evm_deploy.runtimes.registry import plugin_path
from evm_deploy.scan import native
from evm_deploy.toolchain.plugins import block_trace, kernel_isa
from tests.test_fused import block_model, image, random_block
from tests.test_fused_int8 import int8_model, quantized

SHAPES = {
    "tiny": ((56, 48, 3), (28, 96, 6)),
    "small": ((56, 64, 4), (28, 128, 8)),
    "base": ((56, 96, 6), (28, 192, 12)),
}
STAGES = ("pack", "project", "convolve", "parameters", "scan", "output", "gate", "sum")
STATES, SILU, GELU, SOFTPLUS, STATE_STEP = 16, 7, 15, 17, 9  # operations on the multipliers


def products(size: int, dim: int, rank: int, int8_rate: float) -> dict[str, float]:
    """Return the multiply-adds of each stage. int8_rate: products of an int8 layer for each float one."""
    tokens, inner = size * size, 2 * dim
    of_token = {
        "project": dim * inner / int8_rate,
        "convolve": 9 * (inner + dim) + SILU * inner + GELU * dim + dim * dim / int8_rate,
        "parameters": inner * (rank + 2 * STATES) / int8_rate,
        "scan": inner * (STATES * STATE_STEP + rank + SOFTPLUS),
        "output": (dim * inner * 2) / int8_rate + SILU * inner,
    }
    return {stage: tokens * count for stage, count in of_token.items()}


def ticks_of(session: ort.InferenceSession, x: np.ndarray, library: Path, rounds: int) -> tuple[np.ndarray, float]:
    """Run a block; return the least ticks of each stage, and the ticks in a ms."""
    session.run(None, {"x": x})
    with block_trace(library, rounds, len(STAGES)) as ticks:
        start = time.perf_counter()
        for _ in range(rounds):
            session.run(None, {"x": x})
        ms = (time.perf_counter() - start) * 1e3
    return ticks.min(axis=0), ticks.sum() / ms  # what is outside of the stages is below 1 %


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny", choices=SHAPES)
    parser.add_argument("--isa", help="instruction set; default: the best of this CPU")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--library", type=Path, help="native library to measure (default: the installed one)")
    parser.add_argument("--weight-bits", type=int, choices=(7, 8), default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = args.library or plugin_path("onnxruntime")
    kernel = native.open_kernel(library)
    if args.isa and not kernel.evm_scan_force_isa(ctypes.c_char_p(args.isa.encode())):
        parser.error(f"this CPU does not have {args.isa}")
    isa = args.isa or kernel_isa(library)
    float_isa = {"avx512bf16": "avx512", "avx512vnni": "avx512", "avxvnni": "avx2"}.get(isa, isa)
    peak = max(fma_peak(*ISAS[float_isa]) or 0.0 for _ in range(3))
    print(f"{where()}, onnxruntime {ort.__version__}, {isa}, {peak:.0f} multiply-adds a ns, {args.rounds} rounds")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    for size, dim, rank in SHAPES[args.variant]:
        block, x = random_block(0, dim, rank, STATES), image(0, 1, size, size, dim)
        operands = quantized(block, x, largest=LARGEST_WEIGHT[args.weight_bits])
        models = {"float32": block_model(block, 1, size, size), "int8": int8_model(operands, 1, size, size)}
        for precision, model in models.items():
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            ticks, per_ms = ticks_of(session, x, library, args.rounds)
            rate = 1 if precision == "float32" else 4 if "vnni" in isa or isa == "avx512bf16" else 2
            floors = products(size, dim, rank, rate)
            parts = []
            for stage, of in zip(STAGES, ticks / per_ms, strict=True):
                times = f" ({of * 1e6 * peak / floors[stage]:.1f}x)" if stage in floors and peak else ""
                parts.append(f"{stage} {of:.2f}{times}")
            total = sum(ticks) / per_ms
            whole = f" ({total * 1e6 * peak / sum(floors.values()):.2f}x)" if peak else ""
            print(f"{size}x{size}x{dim} {precision:<7} {total:.2f} ms{whole}: " + ", ".join(parts[1:]))
    kernel.evm_scan_force_isa(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
