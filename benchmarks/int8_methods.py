"""Measure the accuracy of the trained T in int8 for each calibration method, and in w8.

    python benchmarks/int8_methods.py [--blocks]

Needs ../shared/trained. Calibration uses 512 generated images, evaluation 2000. The script prints top-1, the points
lost against float, agreement, SQNR and the share of float32's size, with and without smoothing. With --blocks it prints
the accuracy with each block alone in int8, the most sensitive block first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from common import where
from PIL import Image

from evm_deploy import EvmError
from evm_deploy._util.progress import silent
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.calib.candidate import make_candidates
from evm_deploy.calib.evaluate import Accuracy
from evm_deploy.calib.evaluation import Evaluation, graph_outputs
from evm_deploy.calib.histogram import METHODS
from evm_deploy.calib.int8 import candidates, each_block, image_sets
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.hub.graph import trace, with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete
from evm_deploy.export.quantization import candidate_opener, quantization_config
from evm_deploy.export.targets import get_target
from evm_deploy.model.efficientvmamba.checkpoint import KEEP_FLOAT, WEIGHT_ONLY
from evm_deploy.model.families import load_checkpoint
from evm_deploy.toolchain.plugins import find_plugin

TRAINED = Path(__file__).resolve().parents[2] / "shared" / "trained"
CHECKPOINT = TRAINED / "evm_tiny_glyphs64.ckpt"
CALIBRATION_SEED, VALIDATION_SEED = 5000, 7


def figures(a: Accuracy) -> str:
    """Format an accuracy as a line of text."""
    return (
        f"top-1 {100 * a.scores['top1']:.2f} % (float {100 * a.float_scores['top1']:.2f} %, {0 - a.drop:+.2f})"
        f"   same class {100 * a.agreement:.2f} %   SQNR {a.sqnr_db:.1f} dB"
    )


def print_blocks(plan: ExportPlan) -> None:
    """Print the accuracy with each block alone in int8, with and without smoothing."""
    network = load_checkpoint(CHECKPOINT)
    plan, preprocessing = complete(plan, network.spec)
    graph = trace(with_pre_and_postprocessing(network, plan, preprocessing), plan, {})
    config, plugin = quantization_config(plan, network.spec), find_plugin("onnxruntime")
    used, judged = image_sets(config, preprocessing, silent)
    run_float, target = partial(graph_outputs, graph.model, config, plugin), get_target(plan.target)
    evaluate = Evaluation(judged, run_float, config, candidate_opener(target, graph, plan))
    fuses = target.fuses(plan)
    layers = candidates(graph.model, plan.precision, graph.fusable, KEEP_FLOAT, WEIGHT_ONLY, fuses=fuses)
    for smooth, source in make_candidates(graph.model, layers, used, config, plugin, silent).items():
        alone = dict(each_block(source, evaluate, lambda done, total: None))
        for block, accuracy in sorted(alone.items(), key=lambda item: item[1].sqnr_db or 0.0):
            print(f"{block:<20} smooth {smooth:<4} {figures(accuracy)}")


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", action="store_true", help="measure each block alone instead of each method")
    args = parser.parse_args()
    if not TRAINED.is_dir():
        print(f"{TRAINED} not found", file=sys.stderr)
        return 2
    sys.path.insert(0, str(TRAINED))
    from glyphs import glyphs

    print(where())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "calib.npz", images=glyphs(512, CALIBRATION_SEED, 64)[0])
        for i, (image, label) in enumerate(zip(*glyphs(2000, VALIDATION_SEED, 64), strict=True)):
            path = folder / "val" / str(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        val = str(folder / "val")
        w8 = ExportPlan("onnx", precision="w8", imgsz=(64, 64), crop_pct=1.0, val=val, max_drop=100.0)
        int8 = replace(w8, precision="int8", calib=str(folder / "calib.npz"))
        if args.blocks:
            print_blocks(replace(int8, smooth="auto"))
            return 0
        plans = {
            f"{method}{', smoothed' if smooth == 'on' else ''}": replace(int8, calib_method=method, smooth=smooth)
            for method in (*METHODS, "auto")
            for smooth in ("off", "on")
        }
        for method, plan in {**plans, "w8": w8}.items():
            try:
                manifest = export(CHECKPOINT, plan, folder / "out", force=True).manifest
                note = ""
            except EvmError as error:
                manifest = Manifest.read(next((folder / "out").glob("*.rejected")))
                note = f"   rejected: {str(error).splitlines()[0]}"
            size = manifest.details["quantization"]["size_of_fp32"]
            print(f"{method:<20} {figures(Accuracy.from_dict(manifest.accuracy))}   size {size:.3f}{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
