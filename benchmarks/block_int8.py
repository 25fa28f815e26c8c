"""Compare a fused EVSS block with int8 linear layers with the same block in float32: native kernels in ONNX Runtime.

    python benchmarks/block_int8.py [--rounds 40] [--isa avx2] [--weight-bits 7]

The blocks are those of T's two scan stages at 224x224, batch 1, one thread. The weights are random; the ranges are of
the block's own input. Times are CPU times, the least of all rounds. The bound is the ratio if the multiply-adds of
in_proj, x_proj, out_proj and local_proj ran 4 (VNNI) or 2 (pairs of 16-bit products) times as fast as a pure float
multiply-add loop on this core (fma_peak.cpp), and quantising took no time. On a busy machine the measured rate is too
low, and the bound too high.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path

import onnxruntime as ort
import torch
from common import interleave, where

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scan import ISAS, fma_peak

from evm_deploy.calib.quantize import LARGEST_WEIGHT
from evm_deploy.runtimes.registry import plugin_path
from evm_deploy.scan import native
from evm_deploy.toolchain.plugins import kernel_isa
from tests.test_fused import block_model, image, random_block
from tests.test_fused_int8 import int8_model, quantized

SHAPES = ((56, 48, 3), (28, 96, 6))  # H = W, C, R of T's stages at 224x224
STATES = 16


def session(model: bytes) -> ort.InferenceSession:
    """Open a model in ONNX Runtime with the native library and one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(plugin_path("onnxruntime")))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--isa", help="instruction set; default: the best of this CPU")
    parser.add_argument("--weight-bits", type=int, choices=(7, 8), default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernel = native.open_kernel(plugin_path("onnxruntime"))
    if args.isa and not kernel.evm_scan_force_isa(ctypes.c_char_p(args.isa.encode())):
        parser.error(f"this CPU does not have {args.isa}")
    isa = args.isa or kernel_isa(plugin_path("onnxruntime"))
    vnni = isa.endswith("vnni") or isa == "avx512bf16"  # whose int8 blocks are those of avx512vnni
    float_isa = {"avx512bf16": "avx512", "avx512vnni": "avx512", "avxvnni": "avx2"}.get(isa, isa)
    peak = None if isa == "base" else fma_peak(*ISAS[float_isa])  # without FMA the float block is far from that loop
    print(f"{where()}, onnxruntime {ort.__version__}, {isa}, weights of {args.weight_bits} bits, {args.rounds} rounds")
    for size, dim, rank in SHAPES:
        block, x = random_block(0, dim, rank, STATES), image(0, 1, size, size, dim)
        float_block = session(block_model(block, 1, size, size))
        operands = quantized(block, x, largest=LARGEST_WEIGHT[args.weight_bits])
        int8_block = session(int8_model(operands, 1, size, size))
        subjects = {"float": float_block, "int8": int8_block}
        runs = {name: lambda s=s, x=x: s.run(None, {"x": x}) for name, s in subjects.items()}
        least = {name: min(of) for name, of in interleave(runs, args.rounds, clock=time.thread_time).items()}
        line = f"{size}x{size}x{dim}: float {least['float']:.3f} ms, int8 {least['int8']:.3f} ms, float / int8"
        line += f" {least['float'] / least['int8']:.2f}"
        if peak:
            products = size * size * (7 * dim * dim + 2 * dim * (rank + 2 * STATES)) / peak / 1e6
            saved = products * (3 / 4 if vnni else 1 / 2)
            line += f", bound {least['float'] / (least['float'] - saved):.2f} ({peak:.0f} multiply-adds per ns)"
        print(line)
    kernel.evm_scan_force_isa(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
