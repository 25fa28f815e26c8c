"""Time of an inference by module and kind of operation, from the runtime's own profiler.

A block that runs as one node of the native library is divided into the stages that the library times (scan/fused.py).
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.bundle.loaded import LoadedBundle
from evm_deploy.runtimes.base import Feeds, NodeTime
from evm_deploy.scan.fused import OP_TYPES, STAGES
from evm_deploy.toolchain.plugins import block_trace

RUNS = 30  # largest number of profiled runs
SECONDS = 2.0  # no profiled run starts later than this
ROWS = 1 << 16  # capacity of the native library's trace of blocks
SCAN = "SelectiveScan"
SELECTION = "selection"  # module that makes detections or label maps of the network's maps, and its kind

# Kinds of operations, with the operation names of ONNX and the runtimes. All elementwise operations are activations.
KINDS = {
    "projections": "MatMul Gemm FullyConnected MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul QGemm "
    "QLinearMatMul",
    "convolutions": "Conv FusedConv Convolution GroupConvolution QLinearConv ConvInteger",
    "norms": "LayerNormalization SkipLayerNormalization SimplifiedLayerNormalization BatchNormalization RMS MVN",
    "activations": "Add Mul Sub Div Neg Relu Sigmoid Gelu QuickGelu BiasGelu FastGelu Silu Softmax Exp Clip QLinearAdd "
    "QLinearMul QLinearSigmoid Eltwise ReduceMean AveragePool GlobalAveragePool QLinearGlobalAveragePool",
    "layout": "Transpose Reshape Squeeze Unsqueeze Concat Pad Slice Split VariadicSplit Gather Expand Cast Convert "
    "Reorder ReorderInput ReorderOutput StridedSlice QLinearConcat",
    "quantization": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear FakeQuantize",
    "scan": f"{SCAN} Scan TensorIterator Loop",
    "block": " ".join(OP_TYPES),
}
# OpenVINO's node for operations that it compiles together. The kind is taken from the node's name if possible.
UNSPECIFIC = {"Subgraph": "activations"}
KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops.split()}


@dataclass(frozen=True)
class Part:
    """Time in ms that one inference spends in the nodes of one module and kind. calls: number of these nodes."""

    module: str
    kind: str
    ms: float
    calls: int = 1


def measure_layers(model: LoadedBundle, feeds: Feeds) -> dict[str, Any]:
    """Profile inferences on `feeds` and return `Record.layers`; empty if the runtime has no profiler.

    Inferences with and without the profiler alternate, so that other work on the machine slows both alike.
    """
    runtime, profiler = model.profiled(), model.target.profiler
    if runtime is None or profiler is None:
        return {}
    with runtime, block_trace(model.plugin, ROWS, len(STAGES)) as ticks:
        plain, profiled = in_turn(partial(model.run, feeds), partial(runtime.run, feeds))
        nodes = runtime.node_times()
    how = profiler.name
    if profiler.records:
        nodes, node_ms, event_ms = without_recording(nodes, min(profiled) - min(plain))
        how += f", minus its own overhead: {node_ms * 1e3:.1f} us per node"
        how += f", {event_ms * 1e3:.1f} us per event in a loop" if any(node.inside for node in nodes) else ""
    parts = placed(nodes)
    shares = stage_shares(ticks, 2 * (1 + len(plain)), sum(part.kind == "block" for part in parts))
    if len(shares):
        how += ", blocks divided by the native library's counters"
        parts = divided(parts, shares)
    # node_times are those of the fastest run if the profiler records every node, else means over the runs
    inference_ms = min(plain) if profiler.records else statistics.median(plain)
    return summary(how, merged(parts), inference_ms)


def in_turn(*runs: Callable[[], object]) -> list[list[float]]:
    """Call every function of `runs` in turn, for up to RUNS rounds or SECONDS, and return their times in ms.

    The first round is warm-up and not returned; at least one more round follows.
    """
    rounds: list[list[float]] = []
    end = time.perf_counter() + SECONDS
    while len(rounds) < 2 or (len(rounds) < RUNS and time.perf_counter() < end):
        marks = [time.perf_counter()]
        for run in runs:
            run()
            marks.append(time.perf_counter())
        rounds.append([(b - a) * 1e3 for a, b in pairwise(marks)])
    return [list(times) for times in zip(*rounds[1:], strict=True)]


def without_recording(nodes: Sequence[NodeTime], slower_ms: float) -> tuple[list[NodeTime], float, float]:
    """Subtract the profiler's overhead from node times. Return the nodes, and the overhead per node and event in ms.

    Part of the overhead falls within each node's time. The estimate per node is the time of the shortest node, which
    does almost no work. Events in the body of a loop have their whole overhead within the loop node. The estimate per
    event is its share of `slower_ms`, the time by which the profiler slows one inference.
    """
    node_ms = min((node.ms for node in nodes if not node.inside), default=0.0)
    event_ms = max(0.0, slower_ms) / sum(1 + node.inside for node in nodes)
    left = [replace(node, ms=max(0.0, node.ms - node_ms - event_ms * node.inside)) for node in nodes]
    return left, node_ms, event_ms


def placed(nodes: Sequence[NodeTime]) -> list[Part]:
    """Return a Part with module and kind for each node, in order.

    A node that the runtime inserted has no module, and gets the module of the next node. If that next node is a norm,
    the inserted node counts as part of the norm, unless it only moves data (kind `layout`).
    """
    parts, near, near_op = [], "root", ""
    for node in reversed(nodes):
        module, op = names(node.name)
        if module:
            near, near_op = module, op
        kind = KIND_OF.get(node.op, "")
        if SCAN in node.name:
            kind = "scan"
        elif near.partition(".")[0] == SELECTION:
            kind = SELECTION
        elif not module and kind != "layout" and KIND_OF.get(near_op) == "norms":
            kind = "norms"
        parts.append(Part(near, kind or KIND_OF.get(op) or UNSPECIFIC.get(node.op, "other"), node.ms))
    return parts[::-1]


def names(node: str) -> tuple[str, str]:
    """Parse module path and ONNX operation from the name of a node; both are empty if the name has none.

    layers.1.blocks.0.op/Mul_1/QuickGeluFusion/  -> layers.1.blocks.0.op, Mul
    _inlfunc_EVSSBlock_op.in_proj/MatMul         -> EVSSBlock.op.in_proj, MatMul     function inlined by ONNX Runtime
    Subtract_7_acdb_abcd_patch_embed.2/Reshape   -> patch_embed.2, Reshape           change of layout by OpenVINO
    """
    inlined = re.match(r"_inlfunc_([A-Za-z0-9]+)(_token_\d+)?_", node)
    if inlined:
        node = ("" if inlined[1] == SCAN else f"{inlined[1]}.") + node[inlined.end() :]
    node = re.sub(r"^\w+_[a-h]{3,5}_[a-h]{3,5}_", "", node)
    module, slash, rest = node.partition("/")
    if not slash or module == SCAN:
        return "", ""
    return module, re.split(r"[_/]", rest)[0]


def stage_shares(ticks: NDArray[np.uint64], runs: int, blocks: int) -> NDArray[np.float64]:
    """Return the share of each stage in the time of its block, float64 (blocks, stages), each row with sum 1.

    ticks: uint64 (rows, stages), one row for each run, block and image in this order, followed by rows of zeros.
    The result has no rows if there are no ticks, if the trace was full, or if its length does not fit runs and blocks.
    """
    used = ticks[ticks.any(axis=1)]
    if not blocks or not len(used) or len(used) == len(ticks) or len(used) % (runs * blocks):
        return np.empty((0, ticks.shape[1]))
    took = used.reshape(runs, blocks, -1, ticks.shape[1]).sum(axis=(0, 2)).astype(np.float64)
    shares: NDArray[np.float64] = took / took.sum(axis=1, keepdims=True)
    return shares


def divided(parts: Sequence[Part], shares: NDArray[np.float64]) -> list[Part]:
    """Replace each part of kind `block` by one part for each stage, in proportion to `shares` (blocks, stages)."""
    rows, found = iter(shares), []
    for part in parts:
        stages = zip(STAGES, next(rows), strict=True) if part.kind == "block" else [(part.kind, 1.0)]
        found += [Part(part.module, kind, part.ms * float(share)) for kind, share in stages]
    return found


def merged(parts: Sequence[Part]) -> list[Part]:
    """Add up parts of the same module and kind; the order is that of their first appearance."""
    sums: dict[tuple[str, str], Part] = {}
    for part in parts:
        key = part.module, part.kind
        before = sums.get(key, Part(*key, 0.0, 0))
        sums[key] = replace(before, ms=before.ms + part.ms, calls=before.calls + part.calls)
    return list(sums.values())


def summary(how: str, parts: Sequence[Part], inference_ms: float) -> dict[str, Any]:
    """Return `Record.layers` for these parts. `scan_share` is None if undivided blocks contain scans.

    `selection_share` is None if nothing selects.
    how: description of the method. inference_ms: time of an inference without the profiler.
    """
    kinds: dict[str, float] = {}
    for part in parts:
        kinds[part.kind] = kinds.get(part.kind, 0.0) + part.ms
    total = sum(kinds.values())
    known = total and "block" not in kinds
    return {
        "how": how,
        "sum_ms": round(total, 4),
        "of_inference": round(total / inference_ms, 4) if inference_ms else 0.0,
        "scan_share": round(kinds.get("scan", 0.0) / total, 4) if known else None,
        "selection_share": round(kinds[SELECTION] / total, 4) if total and SELECTION in kinds else None,
        "kinds": {kind: round(ms, 4) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        "modules": [{**asdict(part), "ms": round(part.ms, 5)} for part in parts],
    }
