"""Measure bfloat16 products in fused EVSS blocks: EfficientVMamba in OpenVINO, exported with --fp16 --half-blocks.

    python benchmarks/block_bf16.py [--variant tiny] [--imgsz 224] [--rounds 30]

The same model runs with its blocks in float32 (half="false" in the IR), with products of bfloat16 in in_proj, x_proj,
out_proj and local_proj, and with the hint f32; beside it RepViT-M0.9 with the hint bf16, if ../shared/benchmarks is
there. The bound is the ratio of both if these products ran at the rate of a pure loop of AVX512_BF16 (fma_peak.cpp) and
conversion to bfloat16 took no time. Times are CPU times. One thread, batch 1, seeded weights.
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
from common import PEERS, interleave, where
from openvino_models import compiled, runner
from scan import ISAS, fma_peak

from evm_deploy.export.openvino.settings import OpenVinoExportSettings
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
    rate, half_rate = fma_peak(lanes, flags), fma_peak(lanes, [*flags, "-mavx512bf16", "-DBF16"])
    if not rate or not half_rate:
        parser.error("this CPU lacks AVX512_BF16, or there is no g++")
    core = ov.Core()
    core.add_extension(str(extension()))
    with tempfile.TemporaryDirectory() as folder:
        state = golden.model_case(f"{args.variant}_224")["state"]
        checkpoint = Path(folder) / f"evm_{args.variant}.pth"
        torch.save({"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, checkpoint)
        plan = replace(ExportPlan("openvino", scan="plugin"), imgsz=parse_imgsz(args.imgsz), precision="fp16")
        plan = replace(plan, settings=OpenVinoExportSettings(half_blocks=True))
        half = export(checkpoint, plan, Path(folder) / "out").path / "model.xml"
        in_float32 = half.read_text().replace('half="bfloat16"', 'half="false"')
        models = {
            "blocks in float32": core.read_model(in_float32.encode(), half.with_suffix(".bin").read_bytes()),
            "blocks in bfloat16": core.read_model(str(half)),
        }
        height, width = plan.imgsz or (0, 0)
        feeds = {"image": np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)}
        runs = {name: runner(compiled(core, model, "bf16"), feeds) for name, model in models.items()}
        runs["hint f32"] = runner(compiled(core, models["blocks in float32"]), feeds)
        if PEERS.is_dir():
            sys.path.insert(0, str(PEERS))
            import peers

            rival = compiled(core, peers.materialise("repvit_m0_9", Path(folder) / "rival.onnx"), "bf16")
            pixels = np.zeros([*rival.get_compiled_model().input(0).get_partial_shape().get_min_shape()], np.float32)
            runs["RepViT-M0.9"] = runner(rival, {0: pixels})
        count = products(models["blocks in bfloat16"])
        times = interleave(runs, args.rounds, clock=time.process_time)
    float_blocks = np.array(times["blocks in float32"])
    in_blocks, ms = count / rate / 1e6, float(np.median(float_blocks))
    print(f"{where()}, OpenVINO {ov.__version__.split('-')[0]}, EfficientVMamba {args.variant}, {height}x{width}")
    print(f"multiply-adds per ns: float32 {rate:.0f}, bfloat16 {half_rate:.0f}, {half_rate / rate:.2f}x")
    for name, of in times.items():
        low, middle, high = np.percentile(float_blocks / np.array(of), (10, 50, 90))
        print(f"{name:<20} {np.median(of):5.1f} ms   blocks in float32 / it {middle:.2f} ({low:.2f}-{high:.2f})")
    print(f"products of the blocks: {count / 1e6:.0f} M, {in_blocks:.2f} ms at float32's rate")
    print(f"bound with bfloat16 products {ms / (ms - in_blocks * (1 - rate / half_rate)):.3f}")
    print(f"bound with products in no time {ms / (ms - in_blocks):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
