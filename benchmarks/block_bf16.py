"""Bound the gain of bfloat16 products in fused EVSS blocks: EfficientVMamba in OpenVINO with the hint bf16.

    python benchmarks/block_bf16.py [--variant tiny] [--imgsz 224] [--rounds 30]

The extension computes EVSS blocks in float32, whatever the hint. The bound is the ratio of the network's time to the
same time if in_proj, x_proj, out_proj and local_proj ran at the rate of a pure loop of AVX512_BF16 instead of one of
float32 multiply-adds (fma_peak.cpp), and conversion to bfloat16 took no time. The last ratio is the bound if these
products took no time at all (AMX). Times are CPU times, the least of all rounds. One thread, batch 1, seeded weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from common import interleave, where
from openvino_models import compiled, runner
from scan import ISAS, fma_peak

from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan, parse_imgsz
from evm_deploy.toolchain.openvino_extension import extension

PRODUCTS = (3, 6, 13, 16)  # inputs of EVSSBlock: in_proj, x_proj, out_proj, local_proj_weight


def products(model: Any) -> int:
    """Return the multiply-adds of the linear layers in all EVSS blocks; a matrix of x_proj reads a quarter of a map."""
    total = 0
    for op in model.get_ops():
        if op.get_type_name() != "EVSSBlock":
            continue
        _, height, width, _ = op.input(0).get_shape()
        shapes = [list(op.input(i).get_shape()) for i in PRODUCTS]
        total += height * width * sum(int(np.prod(shape)) // (4 if len(shape) == 3 else 1) for shape in shapes)
    return total


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--imgsz", default="224")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    import golden

    lanes, flags = ISAS["avx512"]
    in_float, in_bf16 = fma_peak(lanes, flags), fma_peak(lanes, [*flags, "-mavx512bf16", "-DBF16"])
    if not in_float or not in_bf16:
        parser.error("this CPU lacks AVX512_BF16, or there is no g++")
    core = ov.Core()
    core.add_extension(str(extension()))
    with tempfile.TemporaryDirectory() as folder:
        state = golden.model_case(f"{args.variant}_224")["state"]
        checkpoint = Path(folder) / f"evm_{args.variant}.pth"
        torch.save({"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, checkpoint)
        plan = replace(ExportPlan("openvino", scan="plugin"), imgsz=parse_imgsz(args.imgsz))
        model = core.read_model(str(export(checkpoint, plan, Path(folder) / "out").path / "model.xml"))
        height, width = plan.imgsz or (0, 0)
        feeds = {"image": np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)}
        times = interleave(
            {hint: runner(compiled(core, model, hint), feeds) for hint in ("f32", "bf16")},
            args.rounds,
            clock=time.process_time,
        )
    least = {hint: min(of) for hint, of in times.items()}
    count, ms = products(model), least["bf16"]
    in_blocks = count / in_float / 1e6
    print(f"{where()}, OpenVINO {ov.__version__.split('-')[0]}, EfficientVMamba {args.variant}, {height}x{width}")
    print(f"multiply-adds per ns: float32 {in_float:.0f}, bfloat16 {in_bf16:.0f}, {in_bf16 / in_float:.2f}x")
    print(f"hint f32 {least['f32']:.1f} ms, bf16 {ms:.1f} ms, {least['f32'] / ms:.2f}x")
    print(f"products of the blocks: {count / 1e6:.0f} M, {in_blocks:.2f} ms at float32's rate")
    print(f"bound with bfloat16 products {ms / (ms - in_blocks * (1 - in_float / in_bf16)):.3f}")
    print(f"bound with products in no time {ms / (ms - in_blocks):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
