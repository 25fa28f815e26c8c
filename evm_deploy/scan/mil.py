"""The selective scan as standard MIL operations, for Core ML: the exact two-level scan, shapes static, rank at most 4.

L is cut into chunks of T steps. A state is (b K, D, N, chunks): the last axis, which the Neural Engine pads to 64
bytes, holds the chunks. T steps are unrolled; each step advances all chunks side by side. A carry over the chunks
(Hillis and Steele, ceil(log2 chunks) rounds) gives the state h0 at the start of each chunk. Then y = <C, h + P h0>,
where P is the decay since the start of the chunk. Decays are only multiplied; there is no division by a decay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

PREFIX = "evm_scan"
FEEDS = ("delta", "B", "C")  # inputs of a scan; the layers that write them stay in float
LANES = 32  # float16 values in 64 bytes
OVERHEAD = 128  # fixed cost of an operation, in lanes: weighs few operations against few bytes
MAX_STEPS = 32
STEP_OPS, ROUND_OPS = 10, 7  # state-sized operations per step of a chunk and per round of the carry


def chunk_length(L: int) -> int:
    """Return the steps per chunk with the least static cost: operations times their padded width. L 784 gives T 7."""

    def cost(T: int) -> int:
        chunks = -(-L // T)
        operations = STEP_OPS * T + ROUND_OPS * math.ceil(math.log2(chunks))
        return operations * (-(-chunks // LANES) * LANES + OVERHEAD)

    return min(range(1, min(L, MAX_STEPS) + 1), key=cost)


class NamedOps:
    """MIL builder that names every operation `<prefix>_<type>_<n>`, so that later passes find the operation."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.used: Counter[str] = Counter()

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        from coremltools.converters.mil import Builder

        def make(**inputs: Any) -> Any:
            name = inputs.pop("name", None) or f"{op_type}_{self.used[op_type]}"
            self.used[op_type] += 1
            return getattr(Builder, op_type)(name=f"{self.prefix}_{name}", **inputs)

        return make


def selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    skip: Any,
    bias: Any,
    *,
    delta_softplus: bool = True,
    prefix: str = PREFIX,
    T: int | None = None,
) -> Any:
    """Append the operations of `reference.selective_scan` to the MIL program and return y. Any L.

    The last chunk is padded with steps that leave the state as it is. The operations that read u, delta, A, B, C, skip
    and bias, and the operation that writes y, are named `<prefix>_<name of the tensor>`; the others by type and number.
    T: steps per chunk, by default `chunk_length(L)`.
    """
    mb = NamedOps(prefix)
    batch, K, L, D = u.shape
    T = T or chunk_length(L)
    chunks = -(-L // T)
    G = batch * K

    def split(x: Any, name: str, axis: int) -> Any:
        """Split (b, K, L, X) into T tensors: (G, X, 1, chunks) for axis 2, (G, 1, X, chunks) for axis 1."""
        named = {"name": name}  # the first operation that reads x
        if chunks * T > L:
            fill = [0, 0, 0, 0, 0, chunks * T - L, 0, 0]
            x, named = mb.pad(x=x, pad=fill, mode="constant", constant_val=np.float32(0), **named), {}
        x = mb.reshape(x=x, shape=(G, chunks, T, x.shape[-1]), **named)
        x = mb.transpose(x=x, perm=(0, 3, 2, 1) if axis == 2 else (0, 2, 3, 1))
        return mb.split(x=x, num_splits=T, axis=axis) if T > 1 else (x,)

    dt = mb.add(x=delta, y=_per_direction(mb, bias, K, D, "bias"), name="delta")
    if delta_softplus:
        dt = mb.softplus(x=dt)
    inflow = mb.mul(x=dt, y=u, name="u")
    decays = _per_group(mb, A, batch)
    dts, inflows = split(dt, "dt", 2), split(inflow, "inflow", 2)  # padded after softplus: dt = 0 there
    Bs, Cs = split(B, "B", 1), split(C, "C", 1)
    states: list[Any] = []
    products: list[Any] = []
    for t in range(T):
        decay = mb.exp(x=mb.mul(x=dts[t], y=decays))
        x = mb.mul(x=inflows[t], y=Bs[t])
        states.append(mb.add(x=mb.mul(x=decay, y=states[-1]), y=x) if t else x)
        products.append(mb.mul(x=products[-1], y=decay) if t else decay)
    if chunks > 1:
        entering = _carry(mb, states[-1], products[-1], chunks)
        states = [mb.add(x=h, y=mb.mul(x=P, y=entering)) for h, P in zip(states, products, strict=True)]
    outputs = [
        mb.reduce_sum(x=mb.mul(x=h, y=C), axes=[2], keep_dims=True) for h, C in zip(states, Cs, strict=True)
    ]  # (G, D, 1, chunks)
    y = mb.concat(values=outputs, axis=2) if T > 1 else outputs[0]
    y = mb.reshape(x=mb.transpose(x=y, perm=(0, 3, 2, 1)), shape=(batch, K, chunks * T, D))
    if chunks * T > L:
        y = mb.slice_by_size(x=y, begin=(0, 0, 0, 0), size=(batch, K, L, D))
    return mb.add(x=y, y=mb.mul(x=u, y=_per_direction(mb, skip, K, D, "skip")), name="y")


def _carry(mb: NamedOps, h: Any, P: Any, chunks: int) -> Any:
    """Return the state at the start of each chunk, from the chunks' end states h and their total decays P."""
    shape = tuple(h.shape)

    def shift(x: Any, by: int, fill: float) -> Any:
        kept = mb.slice_by_size(x=x, begin=(0, 0, 0, 0), size=(*shape[:3], chunks - by))
        return mb.pad(x=kept, pad=[0, 0, 0, 0, 0, 0, by, 0], mode="constant", constant_val=np.float32(fill))

    by = 1
    while by < chunks:
        h = mb.add(x=h, y=mb.mul(x=P, y=shift(h, by, 0)))
        if 2 * by < chunks:
            P = mb.mul(x=P, y=shift(P, by, 1))
        by *= 2
    return shift(h, 1, 0)


def _per_direction(mb: NamedOps, x: Any, K: int, D: int, name: str) -> Any:
    """Reshape (K, D) -> (1, K, 1, D)."""
    return mb.reshape(x=x, shape=(1, K, 1, D), name=name)


def _per_group(mb: NamedOps, A: Any, batch: int) -> Any:
    """Tile (K, D, N) -> (b K, D, N, 1); the last operation is named A."""
    if batch > 1:
        A = mb.tile(x=A, reps=(batch, 1, 1))
    return mb.reshape(x=A, shape=(*A.shape, 1), name="A")
