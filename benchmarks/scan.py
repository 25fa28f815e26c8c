"""Measure the selective scan alone: native kernel, portable form and eager torch; threads, length, error, lower bound.

    python benchmarks/scan.py [--rounds 20]

The scan is a stage-0 scan of T at 224x224: L 784, K 4, D 96, N 16, batch 1, float32, one thread unless stated.

    native     an evm::SelectiveScan node in ONNX Runtime, with the library registered
    portable   the same file without the library
    eager      the recurrence in torch, one step at a time, as in Mamba's reference code
    torch      the torch op without the kernel, block by block

The lower bound of arithmetic: for each state and step nine multiplications or fused multiply-adds (five for exp, dt A,
dt u B, h, y), at the rate of a pure multiply-add loop on this core with vectors of the same width (fma_peak.cpp). The
lower bound of memory: every input and output once, at the rate of a copy of an array of that size. The lower bound of
the portable form: a product and a sum of the whole state (K D N floats) for each step, as 2 L operators of ONNX Runtime
in a row; and the same number of operators on one float, which is the cost of the calls. Exit code 1 if a limit of the
project is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from common import interleave, ratio, where
from onnx import helper

from evm_deploy.export.hub.graph import scan_alone
from evm_deploy.runtimes.registry import plugin_path
from evm_deploy.scan import native, onnx_function, reference
from evm_deploy.scan.op import selective_scan

K, D, N, L = 4, 96, 16, 784
OPERATIONS = 9  # multiplications or multiply-adds for each state and step
MIN_TO_PORTABLE, MIN_TO_EAGER, MAX_ERROR, MIN_TWO_THREADS, MAX_NONLINEAR = 5.5, 30, 3e-6, 1.7, 0.10
ISAS = {"base": (4, []), "avx2": (8, ["-mavx2", "-mfma"]), "avx512": (16, ["-march=skylake-avx512"])}


def scan_inputs(length: int, K: int = K, D: int = D, N: int = N) -> list[np.ndarray]:
    """Return the seven inputs, with dt from 0.001 to 1 as in trained networks."""
    g = np.random.default_rng(0)
    shapes = ((1, K, length, D), (1, K, length, D), (K, D, N), (1, K, length, N), (1, K, length, N), (K, D), (K, D))
    arrays = [g.standard_normal(shape) for shape in shapes]
    arrays[1] = arrays[1] - 3
    arrays[2] = -np.exp(arrays[2])
    return [a.astype(np.float32) for a in arrays]


def scan_session(plugin: Path | None, threads: int = 1) -> ort.InferenceSession:
    """Open a model with one scan in ONNX Runtime; without a plugin the scan is portable."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if plugin:
        options.register_custom_ops_library(str(plugin))
    body = helper.make_model(helper.make_graph([], "none", [], []), opset_imports=[helper.make_opsetid("", 20)])
    body.opset_import.append(helper.make_opsetid(onnx_function.DOMAIN, 1))
    body.ir_version = 10
    body.functions.append(onnx_function.selective_scan_function(20))
    return ort.InferenceSession(scan_alone(body).SerializeToString(), options, providers=["CPUExecutionProvider"])


def eager_loop(u, delta, A, B, C, skip, bias):
    """Compute the scan in torch, channels first, one step at a time, after the decays and inflows of all steps."""
    dt = torch.nn.functional.softplus(delta + bias[:, None]).transpose(2, 3)  # (b, K, D, L)
    u = u.transpose(2, 3).contiguous()
    decay = torch.exp(torch.einsum("bkdl,kdn->bkdln", dt, A))
    inflow = torch.einsum("bkdl,bkln,bkdl->bkdln", dt, B, u)
    h, steps = torch.zeros_like(decay[..., 0, :]), []
    for t in range(u.shape[3]):
        h = decay[..., t, :] * h + inflow[..., t, :]
        steps.append(torch.einsum("bkdn,bkn->bkd", h, C[:, :, t]))
    return (torch.stack(steps, dim=3) + skip[..., None] * u).transpose(2, 3)


def fma_peak(lanes: int, flags: list[str]) -> float | None:
    """Measure the multiply-adds per nanosecond; None without a compiler, or if this CPU lacks the instructions."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).with_name("fma_peak.cpp")
        command = ["g++", "-O2", "-ffp-contract=fast", f"-DLANES={lanes}", *flags, str(source), "-o", str(program)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return None


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    plugin = plugin_path("onnxruntime")
    inputs = scan_inputs(L)
    tensors = [torch.from_numpy(a) for a in inputs]
    feeds = dict(zip(onnx_function.INPUTS, inputs, strict=True))
    one, two, body = scan_session(plugin), scan_session(plugin, 2), scan_session(None)

    def in_torch():
        with native.without_native_scan():
            return selective_scan(*tensors)

    times = interleave(
        {
            "native": lambda: one.run(None, feeds),
            "native, 2 threads": lambda: two.run(None, feeds),
            "portable": lambda: body.run(None, feeds),
            "eager": lambda: eager_loop(*tensors),
            "torch": in_torch,
        },
        rounds,
    )
    want = reference.selective_scan(*inputs)
    np.testing.assert_allclose(eager_loop(*tensors).numpy(), want, atol=1e-5 * np.abs(want).max())
    error = float(np.abs(one.run(None, feeds)[0] - want).max() / np.abs(want).max())
    print(f"{where()}, onnxruntime {ort.__version__}, torch {torch.__version__}")
    print(f"L {L}, K {K}, D {D}, N {N}, float32, {rounds} rounds")
    medians = {}
    for name in times:
        medians[name], text = ratio(times, name, "native")
        print(f"{name:<18} / native   {text}  median {statistics.median(times[name]):.2f} ms")
    print(f"error against float64         {error:.1e} of the largest output")
    failed = medians["portable"] < MIN_TO_PORTABLE or medians["eager"] < MIN_TO_EAGER or error > MAX_ERROR
    failed |= 1 / medians["native, 2 threads"] < MIN_TWO_THREADS
    failed |= print_lengths(one, rounds)
    print_portable_floor(lambda: body.run(None, feeds), rounds)
    print_floors(one, feeds, rounds)
    return int(failed)


def print_lengths(session: ort.InferenceSession, rounds: int) -> bool:
    """Print the time per step for L from 196 to 12 544; return whether the total time is not linear in L."""
    lengths = (196, 784, 3136, 12544)
    feeds = {n: dict(zip(onnx_function.INPUTS, scan_inputs(n), strict=True)) for n in lengths}
    times = interleave({str(n): lambda n=n: session.run(None, feeds[n]) for n in lengths}, rounds)
    per_step = {n: statistics.median(times[str(n)]) / n for n in lengths}
    middle = statistics.median(per_step.values())
    print("time per step, of L 784       " + ", ".join(f"L {n}: {per_step[n] / per_step[784]:.2f}" for n in lengths))
    return max(abs(value / middle - 1) for value in per_step.values()) > MAX_NONLINEAR


def steps_alone(floats: int) -> ort.InferenceSession:
    """Open a model of L products and L sums of an array of `floats` floats, in turn, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    shape = helper.make_tensor_value_info("h0", onnx.TensorProto.FLOAT, [floats])
    names = [f"h{i}" for i in range(2 * L + 1)]
    nodes = [
        helper.make_node("Add" if i % 2 else "Mul", [names[i], "inflow" if i % 2 else "decay"], [names[i + 1]])
        for i in range(2 * L)
    ]
    graph = helper.make_graph(
        nodes,
        "steps",
        [
            shape,
            *(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [floats]) for name in ("decay", "inflow")),
        ],
        [helper.make_tensor_value_info(names[-1], onnx.TensorProto.FLOAT, [floats])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def print_portable_floor(portable: Callable[[], Any], rounds: int) -> None:
    """Print the time of the portable form over that of its steps alone, and over that of as many calls."""
    subjects: dict[str, Callable[[], Any]] = {"portable": portable}
    for name, floats in (("steps", K * D * N), ("calls", 1)):
        given = {key: np.full(floats, 0.5, np.float32) for key in ("h0", "decay", "inflow")}
        session = steps_alone(floats)
        subjects[name] = lambda session=session, given=given: session.run(None, given)
    times = interleave(subjects, rounds)
    for name, what in (("steps", f"{2 * L} products and sums of {K * D * N} floats"), ("calls", f"{2 * L} calls")):
        _, text = ratio(times, "portable", name)
        print(f"portable / its {what}   {text}  median {statistics.median(times[name]):.2f} ms")


def print_floors(session: ort.InferenceSession, feeds: dict[str, np.ndarray], rounds: int) -> None:
    """Print the time of each instruction set over the lower bounds of arithmetic and memory."""
    kernel = native.open_kernel(plugin_path("onnxruntime"))
    moved = sum(a.nbytes for a in feeds.values()) + feeds["u"].nbytes
    block = np.zeros(moved // 8, np.float32)
    copy = interleave({"copy": block.copy}, rounds)["copy"]  # reads and writes half of `moved` each
    for isa, (lanes, flags) in ISAS.items():
        if not kernel.evm_scan_force_isa(ctypes.c_char_p(isa.encode())):
            continue
        peak = fma_peak(lanes, flags)
        took = min(interleave({"scan": lambda: session.run(None, feeds)}, rounds)["scan"])
        if peak:
            floor = L * K * D * N * OPERATIONS / peak / 1e6
            print(
                f"floor, {isa:<7}                {took:.2f} ms is {took / floor:.2f}x the {floor:.2f} ms of its"
                f" multiply-adds ({peak:.0f} per ns), {took / min(copy):.0f}x the {min(copy):.3f} ms of its"
                f" {moved / 1e6:.1f} MB"
            )
    kernel.evm_scan_force_isa(None)


if __name__ == "__main__":
    sys.exit(main())
