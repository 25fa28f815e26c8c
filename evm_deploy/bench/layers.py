"""Where the time of an inference goes: by module and kind of operation, from the runtime's own profiler.

Blocks that are one node of the native library are divided by the stages that it counts (scan/fused.py).
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

RUNS = 30  # with the profiler, at most
SECONDS = 2.0  # and none begins after
ROWS = 1 << 16  # of the trace of blocks
SCAN = "SelectiveScan"

# What operations are of a kind, as the runtimes and ONNX call them. Activations: whatever is done element by element.
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
UNSPECIFIC = {"Subgraph": "activations"}  # what OpenVINO compiles together: its name may say more
KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops.split()}


@dataclass(frozen=True)
class Part:
    """Milliseconds of one inference in nodes of one module and kind. calls: how many such nodes."""

    module: str
    kind: str
    ms: float
    calls: int = 1


def measure_layers(model: LoadedBundle, feeds: Feeds) -> dict[str, Any]:
    """`Record.layers` of one inference on `feeds`; empty where the runtime has no profiler.

    Inferences with the profiler and without take turns, so that what else the machine does hits both.
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
        how += f", less what recording takes: {node_ms * 1e3:.1f} us a node"
        how += f", {event_ms * 1e3:.1f} us an event in a loop" if any(node.inside for node in nodes) else ""
    parts = placed(nodes)
    shares = stage_shares(ticks, 2 * (1 + len(plain)), sum(part.kind == "block" for part in parts))
    if len(shares):
        how += ", blocks by the native library's own counters"
        parts = divided(parts, shares)
    # as node_times: of the fastest, or means
    inference_ms = min(plain) if profiler.records else statistics.median(plain)
    return summary(how, merged(parts), inference_ms)


def in_turn(*runs: Callable[[], object]) -> list[list[float]]:
    """Milliseconds of each of `runs`, up to RUNS times, once at least; the first round does not count."""
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
    """The nodes less what it took to record them; what is taken off for a node, and for an event within one, in ms.

    Recording falls partly within the time of a node: about what the shortest node takes, which does next to nothing.
    For events in a loop's body all of it is in the loop: their part in `slower_ms`, by which an inference is slower
    with the profiler.
    """
    node_ms = min((node.ms for node in nodes if not node.inside), default=0.0)
    event_ms = max(0.0, slower_ms) / sum(1 + node.inside for node in nodes)
    left = [replace(node, ms=max(0.0, node.ms - node_ms - event_ms * node.inside)) for node in nodes]
    return left, node_ms, event_ms


def placed(nodes: Sequence[NodeTime]) -> list[Part]:
    """Module and kind of each node, in order.

    A node that the runtime made has no module: it gets that of the next one, for which it was made. Where that is a
    norm it is a part of it, unless it moves data.
    """
    parts, near, near_op = [], "root", ""
    for node in reversed(nodes):
        module, op = names(node.name)
        if module:
            near, near_op = module, op
        kind = KIND_OF.get(node.op, "")
        if SCAN in node.name:
            kind = "scan"
        elif not module and kind != "layout" and KIND_OF.get(near_op) == "norms":
            kind = "norms"
        parts.append(Part(near, kind or KIND_OF.get(op) or UNSPECIFIC.get(node.op, "other"), node.ms))
    return parts[::-1]


def names(node: str) -> tuple[str, str]:
    """Module path and ONNX operation in the name of a node; empty where it says none.

    layers.1.blocks.0.op/Mul_1/QuickGeluFusion/  -> layers.1.blocks.0.op, Mul
    _inlfunc_EVSSBlock_op.in_proj/MatMul         -> EVSSBlock.op.in_proj, MatMul     a body that the runtime inlined
    Subtract_7_acdb_abcd_patch_embed.2/Reshape   -> patch_embed.2, Reshape           a change of layout on the way
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
    """Of the time of each block, that of each stage, (blocks, stages); no rows where they were not counted.

    ticks: (rows, stages), a row for each run, block and image, in that order, and zeros after them.
    """
    used = ticks[ticks.any(axis=1)]
    if not blocks or not len(used) or len(used) == len(ticks) or len(used) % (runs * blocks):
        return np.empty((0, ticks.shape[1]))
    took = used.reshape(runs, blocks, -1, ticks.shape[1]).sum(axis=(0, 2)).astype(np.float64)
    shares: NDArray[np.float64] = took / took.sum(axis=1, keepdims=True)
    return shares


def divided(parts: Sequence[Part], shares: NDArray[np.float64]) -> list[Part]:
    """The parts, each block as its stages."""
    rows, found = iter(shares), []
    for part in parts:
        stages = zip(STAGES, next(rows), strict=True) if part.kind == "block" else [(part.kind, 1.0)]
        found += [Part(part.module, kind, part.ms * float(share)) for kind, share in stages]
    return found


def merged(parts: Sequence[Part]) -> list[Part]:
    """One part for each module and kind, in the order in which they first ran."""
    sums: dict[tuple[str, str], Part] = {}
    for part in parts:
        key = part.module, part.kind
        before = sums.get(key, Part(*key, 0.0, 0))
        sums[key] = replace(before, ms=before.ms + part.ms, calls=before.calls + part.calls)
    return list(sums.values())


def summary(how: str, parts: Sequence[Part], inference_ms: float) -> dict[str, Any]:
    """`Record.layers` of these parts. The scans' share is None where blocks hold some of them."""
    kinds: dict[str, float] = {}
    for part in parts:
        kinds[part.kind] = kinds.get(part.kind, 0.0) + part.ms
    total = sum(kinds.values())
    known = total and "block" not in kinds
    return {
        "how": how,
        "sum_ms": round(total, 4),
        "of_inference": round(total / inference_ms, 4),
        "scan_share": round(kinds.get("scan", 0.0) / total, 4) if known else None,
        "kinds": {kind: round(ms, 4) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        "modules": [{**asdict(part), "ms": round(part.ms, 5)} for part in parts],
    }
