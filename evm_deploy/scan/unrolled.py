"""The selective scan as standard ONNX ops without loop, function or sequence, which TensorRT does not support.

Two levels: L is cut into chunks of T steps. All chunks run their T steps side by side from a zero state and keep state
and decay of every step. A carry then runs over the chunks and corrects every state:

    h_t = a_t h_(t-1) + x_t;   P_t = a_t P_(t-1);   carry_(c+1) = P_T carry_c + h_T;   y_t = <C_t, h_t + P_t carry_c>

States are (b, K, chunks, N, D). There is no division by a cumulated decay. L is static; the batch may be dynamic.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evm_deploy.scan.onnx_function import Body, softplus_series

if TYPE_CHECKING:
    import onnx

CHUNKS = 2  # index of the axis of chunks in a state
MAX_STEPS = 14  # 98 MB instead of 101 for L = 784, D = 96 (docs/performance.md)


def chunk_length(L: int) -> int:
    """Return the steps per chunk: about the number of chunks, at most MAX_STEPS.

    The limit saves memory traffic: the states of every step are written and read again.
    """
    return max(1, min(MAX_STEPS, round(math.sqrt(L))))


def unrolled_scan(
    reads: dict[str, str],
    writes: str,
    L: int,
    prefix: str,
    steps: int | None = None,
    *,
    softplus: bool = True,
    six_axes: bool = False,
) -> list[onnx.NodeProto]:
    """Return nodes that compute the tensor `writes` from the tensors `reads`, for sequences of length L.

    reads: names of the tensors for u, delta, A, B, C, skip and bias. prefix: prefix of all new names. steps: steps per
    chunk T, by default `chunk_length(L)`; L need not be a multiple of T. softplus: False for dt = delta + bias.
    six_axes: whether tensors may have six axes. NPUs take five at most; kernels of TensorRT read and write less so.
    """
    f = Body(prefix)
    T = steps or chunk_length(L)
    chunks = -(-L // T)

    def split(tensor: str, *, column: bool) -> list[str]:  # (b, K, L, X) -> T times (b, K, chunks, 1, X), or (.., X, 1)
        if chunks * T > L:  # padded after softplus: a padded step has dt = 0 and keeps the state
            tensor = f.op("Pad", tensor, f.const([0, 0, 0, 0, 0, 0, chunks * T - L, 0]))
        if six_axes:
            cut = f.op("Reshape", tensor, f.const([0, 0, chunks, T, *((-1, 1) if column else (1, -1))]))
            parts = f.op("Split", cut, axis=3, num_outputs=T, outputs=T) if T > 1 else [cut]
            return [f.op("Squeeze", part, three) for part in parts]
        cut = f.op("Reshape", tensor, f.const([0, 0, chunks, T, -1]))
        if column:
            cut = f.op("Transpose", cut, perm=[0, 1, 2, 4, 3])
        return f.op("Split", cut, axis=4 if column else 3, num_outputs=T, outputs=T) if T > 1 else [cut]

    one, three = f.const([1]), f.const([3])
    dt = f.op("Add", reads["delta"], f.op("Unsqueeze", reads["bias"], one))
    if softplus:
        dt = softplus_series(f, dt)
    A = f.op("Unsqueeze", f.op("Transpose", reads["A"], perm=[0, 2, 1]), one)  # (K, 1, N, D)
    rates, inflows = split(dt, column=False), split(f.op("Mul", dt, reads["u"]), column=False)
    Bs, Cs = split(reads["B"], column=True), split(reads["C"], column=True)

    states: list[str] = []
    decays: list[str] = []
    for rate, inflow, B in zip(rates, inflows, Bs, strict=True):
        decay, x = f.op("Exp", f.op("Mul", rate, A)), f.op("Mul", inflow, B)
        states.append(f.op("Add", f.op("Mul", decay, states[-1]), x) if states else x)
        decays.append(f.op("Mul", decay, decays[-1]) if decays else decay)
    if chunks > 1:
        carry = _carry(f, states[-1], decays[-1], chunks)
        states = [f.op("Add", h, f.op("Mul", P, carry)) for h, P in zip(states, decays, strict=True)]
    sums = [f.op("ReduceSum", f.op("Mul", h, C), three, keepdims=1) for h, C in zip(states, Cs, strict=True)]
    y = f.op("Reshape", f.op("Concat", *sums, axis=3), f.const([0, 0, chunks * T, -1]))
    if chunks * T > L:
        y = f.op("Slice", y, f.const([0]), f.const([L]), f.const([2]))
    skipped = f.op("Mul", reads["u"], f.op("Unsqueeze", reads["skip"], one))
    f.write("Add", [y, skipped], writes)
    return f.nodes


def _carry(f: Body, end: str, decay: str, chunks: int) -> str:
    """Return the state at the start of each chunk, (b, K, chunks, N, D).

    end: end states of chunks that start from zero. decay: total decay over each chunk.
    """
    ends = f.op("Split", end, axis=CHUNKS, num_outputs=chunks, outputs=chunks)
    decays = f.op("Split", decay, axis=CHUNKS, num_outputs=chunks, outputs=chunks)
    entering = [f.op("Sub", ends[0], ends[0]), ends[0]]  # zeros: QNN's emulator ends the process at a product with 0
    for end_of, decay_of in zip(ends[1:-1], decays[1:-1], strict=True):
        entering.append(f.op("Add", f.op("Mul", decay_of, entering[-1]), end_of))
    return str(f.op("Concat", *entering, axis=CHUNKS))
