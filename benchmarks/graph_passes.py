"""Measure the pass merge_moves: nodes of the hub graph and CPU time in ONNX Runtime, with and without the pass.

    python benchmarks/graph_passes.py [CHECKPOINT | FILE.onnx] [--rounds 40]

Without a checkpoint the network is the suite's network of foreign blocks (tests/foreign_package.py). Both graphs run in
turn in one process, with one thread, in CPU time of that thread, so that other processes matter less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort
import torch
from common import interleave, ratio, where

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evm_deploy
from evm_deploy.export.hub import graph
from evm_deploy.export.hub.merge_moves import MOVES, merge_moves
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.model import Network
from evm_deploy.runtimes.registry import plugin_path


def foreign() -> Network:
    """Return the network of the suite's blocks."""
    with evm_deploy.cpu_mamba():
        from tests import foreign_package
    torch.manual_seed(0)
    module = foreign_package.Network(*foreign_package.BLOCKS).eval()
    return Network.of(module, torch.rand(1, 3, 32, 48), name="foreign")


def hub(given: str | Network) -> dict[str, onnx.ModelProto]:
    """Trace the hub graph once. Returns it as it was before the pass, and after."""
    before = onnx.ModelProto()

    def merge(model: onnx.ModelProto, blocks: Iterable[str]) -> int:
        before.CopyFrom(model)
        return merge_moves(model, blocks)

    with patch.object(graph, "merge_moves", merge):
        source = Source(given)
        plan, preprocessing = complete(ExportPlan("onnx", "fp32"), source.network(ExportPlan("onnx", "fp32")).spec)
        after = graph.trace(source.reference(plan, preprocessing), plan, {}).model
    before.ir_version = after.ir_version
    return {"before": before, "after": after}


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", nargs="?", help="checkpoint or ONNX file of a hub graph (default: the suite's blocks)"
    )
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    if str(args.checkpoint).endswith(".onnx"):
        models = {"before": onnx.load(args.checkpoint), "after": onnx.load(args.checkpoint)}
        merge_moves(models["after"])
    else:
        models = hub(args.checkpoint or foreign())
    print(f"{where()}, onnxruntime {ort.__version__}, {args.checkpoint or 'foreign blocks'}, {args.rounds} rounds")
    for name, model in models.items():
        kinds = Counter(node.op_type for node in model.graph.node)
        moves = ", ".join(f"{kinds[kind]} {kind}" for kind in MOVES if kinds[kind])
        print(f"{name:<7} {sum(kinds.values())} nodes: {moves}")
    for plugin in (plugin_path("onnxruntime"), None):
        sessions = {name: session(model, plugin) for name, model in models.items()}
        first = sessions["before"].get_inputs()[0]
        shape = [size if isinstance(size, int) else 1 for size in first.shape]
        x = (np.random.default_rng(0).random(shape) * 255).astype(np.uint8 if "uint8" in first.type else np.float32)
        results = [each.run(None, {first.name: x}) for each in sessions.values()]
        equal = all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
        feeds = {first.name: x}
        subjects = {name: partial(each.run, None, feeds) for name, each in sessions.items()}
        times = interleave(subjects, args.rounds, clock=time.thread_time)
        _, text = ratio(times, "after", "before")
        least = " -> ".join(f"{min(times[name]):.2f}" for name in models)
        print(f"{'plugin' if plugin else 'portable':<8} after / before {text}, least {least} ms, same bits: {equal}")
    return 0


def session(model: onnx.ModelProto, plugin: Path | None) -> ort.InferenceSession:
    """Open a graph with one thread; without a plugin its scans are portable."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if plugin:
        options.register_custom_ops_library(str(plugin))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    sys.exit(main())
