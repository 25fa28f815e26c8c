"""Measure int8 with seeded weights of T, S and B at 224x224: SQNR of the logits, for all blocks and each block alone.

    python benchmarks/int8_seeded.py [--variant tiny|small|base]

Of 128 generated images, every eighth is used for evaluation, the others for calibration. The weights are not trained:
the SQNR shows the effect of rounding on the network, not the loss of accuracy (int8_methods.py measures the loss).
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from common import where
from safetensors.numpy import save_file

from evm_deploy._util.progress import silent
from evm_deploy.calib.candidate import make_candidates
from evm_deploy.calib.evaluation import Evaluation, graph_outputs
from evm_deploy.calib.int8 import candidates, each_block, image_sets
from evm_deploy.export import ExportPlan
from evm_deploy.export.hub.graph import trace, with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete
from evm_deploy.export.quantization import candidate_opener, quantization_config
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.export.targets import get_target
from evm_deploy.model.efficientvmamba.checkpoint import KEEP_FLOAT, WEIGHT_ONLY
from evm_deploy.model.families import load_checkpoint
from evm_deploy.toolchain.plugins import find_plugin

IMAGES, SEED = 128, 1000


def print_variant(variant: str, folder: Path) -> None:
    """Print the SQNR of one variant, for all blocks and for each block alone, with and without smoothing."""
    import golden

    checkpoint = folder / f"{variant}.safetensors"
    save_file(golden.model_case(f"{variant}_224")["state"], checkpoint)
    wanted = ExportPlan("onnx", precision="int8", imgsz=(224, 224), calib=str(folder / "calib.npz"))
    network = load_checkpoint(checkpoint)
    plan, preprocessing = complete(wanted, network.spec)
    graph = trace(with_pre_and_postprocessing(network, plan, preprocessing), plan, {})
    config, plugin = quantization_config(plan, network.spec), find_plugin("onnxruntime")
    used, judged = image_sets(config, preprocessing, silent)
    assert judged is not None
    run_float, target = partial(graph_outputs, graph.model, config, plugin), get_target(plan.target)
    evaluate = Evaluation(judged, run_float, config, candidate_opener(target, graph, plan))
    fuses = target.fuses(plan)
    layers = candidates(graph.model, plan.precision, graph.fusable, KEEP_FLOAT, WEIGHT_ONLY, fuses=fuses)
    found = make_candidates(graph.model, layers, used, config, plugin, silent)
    rows = {name: dict(each_block(source, evaluate, lambda done, total: None)) for name, source in found.items()}
    print(f"\n{variant}, {len(judged)} images          as is  smoothed")
    whole = [evaluate(source, source.blocks).sqnr_db for source in found.values()]
    print(f"{'all blocks':<22} {whole[0]:6.1f} dB {whole[1]:6.1f} dB")
    for block in rows["off"]:
        print(f"{block:<22} {rows['off'][block].sqnr_db:6.1f} dB {rows['on'][block].sqnr_db:6.1f} dB")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("tiny", "small", "base"), help="default: all three")
    args = parser.parse_args()
    print(where())
    with tempfile.TemporaryDirectory() as name:
        images = [synthetic_image(224, 224, seed=SEED + i) for i in range(IMAGES)]
        np.savez(Path(name) / "calib.npz", images=np.stack(images))
        for variant in (args.variant,) if args.variant else ("tiny", "small", "base"):
            print_variant(variant, Path(name))


if __name__ == "__main__":
    main()
