"""Measure int8 of Mambas of PyPI and of the test suite: SQNR of the outputs, with and without float around the scans.

    python benchmarks/foreign_int8.py [NAME ..]

Weights are seeded, not trained. Of 64 generated images, every eighth is used for evaluation, the others for
calibration. Variants: `feeds` keeps the layers in float that write delta, B and C; `around` also those that write u
and read y.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import where

sys.path.insert(0, str(Path(__file__).parents[1]))

import evm_deploy
from evm_deploy._util.progress import silent
from evm_deploy.calib.candidate import make_candidates
from evm_deploy.calib.evaluation import Evaluation, graph_outputs
from evm_deploy.calib.int8 import candidates, image_sets
from evm_deploy.export import ExportPlan
from evm_deploy.export.hub.graph import trace, with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete
from evm_deploy.export.quantization import candidate_opener, quantization_config
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.export.targets import get_target
from evm_deploy.model import Network
from evm_deploy.toolchain.plugins import find_plugin
from tests.test_foreign_packages import PACKAGES, SIZE, seed
from tests.toy import toy_network

IMAGES, SEED = 64, 1000
NAMES = ("toy", *PACKAGES)


def network_of(name: str) -> Network:
    """Return a network by its name."""
    if name == "toy":
        return toy_network()
    with evm_deploy.cpu_mamba():
        module = seed(PACKAGES[name][0]())
    return Network.of(module, torch.rand(1, 3, *SIZE), name=name)


def print_network(name: str, calib: Path) -> None:
    """Print the SQNR and the number of quantised layers of one network, for both variants."""
    network = network_of(name)
    wanted = ExportPlan("onnx", precision="int8", imgsz=SIZE, calib=str(calib), force_calib=True)
    plan, preprocessing = complete(wanted, network.spec)
    graph = trace(with_pre_and_postprocessing(network, plan, preprocessing), plan, {})
    config, plugin = quantization_config(plan, network.spec), find_plugin("onnxruntime")
    used, judged = image_sets(config, preprocessing, silent)
    assert judged is not None
    expected = partial(graph_outputs, graph.model, config, plugin)
    evaluate = Evaluation(judged, expected, config, candidate_opener(get_target(plan.target), graph, plan))
    for variant, around in (("feeds", False), ("around", True)):
        chosen = candidates(graph.model, plan.precision, graph.fusable, float_around_scans=around)
        found = make_candidates(graph.model, chosen, used, config, plugin, silent)
        figures = "  ".join(f"{how} {evaluate(each, each.blocks).sqnr_db:5.1f} dB" for how, each in found.items())
        print(f"{name:<14} {variant:<7} {len(chosen):3} layers   smoothed: {figures}", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=(*NAMES, []), help="default: all")
    args = parser.parse_args()
    print(where())
    with tempfile.TemporaryDirectory() as folder:
        calib = Path(folder) / "calib.npz"
        np.savez(calib, images=np.stack([synthetic_image(*SIZE, seed=SEED + i) for i in range(IMAGES)]))
        for name in args.names or NAMES:
            print_network(name, calib)


if __name__ == "__main__":
    main()
