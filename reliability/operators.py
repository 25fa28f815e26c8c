"""Test the native operators in their runtimes with random sizes and values, under Address- and UBSanitizer.

    python -m reliability.operators [onnxruntime|openvino ..] [--runs 5000] [--seed 1] [-o dist/reliability]

A problem is one node with sizes from 0 up and values that may be NaN, Inf, denormal or huge. In half of the problems
one input has a wrong size, a huge size beside a zero, or a wrong rank. A problem that fits must be computed: scans must
give the values of the float64 loop, and NaN inputs must give NaN outputs. A problem that does not fit must be refused
with the operator's message. Exit code 1 if a check fails or a sanitizer reports an error. Needs Linux and g++.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.toolchain.compile import Compiler, read_recipe
from reliability import chosen

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all")
# -O1 compiles much faster than -O3 and has the same loads and stores; -g1 has the lines that a finding names
CHECKED = ("-O1", "-g1", *SANITIZE)
# Inputs of the operators, as in native/scan/ops.h. A letter stands for a size, a digit for itself. Z: 2 d. X: R + 2 N.
SCAN = "u:bKLD delta:bKLD A:KDN B:bKLN C:bKLN skip:KD bias:KD"
BLOCK = (
    "x:bHWC norm_weight:C norm_bias:C in_proj:CZ conv_weight:d133 conv_bias:d x_proj:4dX dt_proj:4Rd A:4dN skip:4d "
    "dt_bias:4d out_norm_weight:d out_norm_bias:d out_proj:dC local_conv_weight:C133 local_conv_bias:C "
    "local_proj_weight:CC11 local_proj_bias:C gate_norm_weight:C gate_norm_bias:C gate_reduce_weight:CG "
    "gate_reduce_bias:G gate_select_weight:GC gate_select_bias:C"
)


def _with_int8(block: str, layer: str, weight: str, scales: str) -> str:
    """Return the inputs of a block with this layer in int8."""
    there = f"{layer}:{weight}:int8 {layer}_scale:{scales} {layer}_input_scale: {layer}_input_zero_point::uint8"
    return block.replace(f" {layer}:{weight} ", f" {there} ")


INT8 = BLOCK
for layer in (("in_proj", "CZ", "Z"), ("out_proj", "dC", "C"), ("local_proj_weight", "CC11", "C")):
    INT8 = _with_int8(INT8, *layer)
INT8_X_PROJ = _with_int8(INT8, "x_proj", "4dX", "41X")
OPERATORS = {"SelectiveScan": SCAN, "EVSSBlock": BLOCK, "EVSSBlockInt8": INT8, "EVSSBlockInt8XProj": INT8_X_PROJ}
# Largest sizes of problems that fit.
LARGEST = {**dict.fromkeys("bKLHW", 5), "D": 70, "C": 40, "d": 50, "N": 20, "R": 5, "G": 6}
WIDEST = 65536  # largest number of channels, states and ranks that the operators accept
WILD = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, 3e38, -3e38, 88.8, -104.0]
HUGE = (2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**46)

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Operand:
    """An input of an operator: name, axes (one character each) and dtype."""

    name: str
    axes: str
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Operand:
        """Parse `name:axes` or `name:axes:dtype`."""
        name, axes, dtype = (*text.split(":"), "float32")[:3]
        return cls(name, axes, dtype)


@dataclass(frozen=True)
class Problem:
    """An operator and its inputs. tame: all values have a moderate size."""

    op: str
    arrays: Arrays
    tame: bool

    @property
    def fits(self) -> bool:
        """Whether the operator must accept the inputs."""
        sizes: dict[str, int] = {}
        for operand in operands(self.op):
            shape = self.arrays[operand.name].shape
            if len(shape) != len(operand.axes):
                return False
            for axis, size in zip(operand.axes, shape, strict=True):
                if size != (int(axis) if axis.isdigit() else sizes.setdefault(axis, size)):
                    return False
                if size > (2**31 - 1 if axis in "bKLHW" else 3 * WIDEST if axis in "XZ" else WIDEST):
                    return False
        if "Z" in sizes and (sizes["Z"] != 2 * sizes["d"] or sizes["X"] != sizes["R"] + 2 * sizes["N"]):
            return False
        scales = [float(array) for name, array in self.arrays.items() if name.endswith("_input_scale")]
        return all(np.finfo(np.float32).tiny <= scale < math.inf for scale in scales)


@cache
def operands(op: str) -> list[Operand]:
    """Return the inputs of an operator."""
    return [Operand.parse(text) for text in OPERATORS[op].split()]


def problems(seed: int) -> Iterator[Problem]:
    """Yield problems without end; the same seed gives the same problems."""
    for i in range(1 << 62):
        g = np.random.default_rng((seed, i))
        op, tame = list(OPERATORS)[i % len(OPERATORS)], bool(g.random() < 0.6)
        sizes = {axis: int(g.integers(0 if g.random() < 0.1 else 1, largest + 1)) for axis, largest in LARGEST.items()}
        empty = bool(g.random() < 0.1)
        if empty:
            sizes = emptied(g, op, sizes)
        sizes |= {"Z": 2 * sizes["d"], "X": sizes["R"] + 2 * sizes["N"], **{str(n): n for n in range(10)}}
        arrays = {each.name: values(g, each, [sizes[axis] for axis in each.axes], tame) for each in operands(op)}
        if not empty and g.random() < 0.5:
            name = str(g.choice(list(arrays)))
            arrays[name] = misshapen(g, arrays[name])
        yield Problem(op, arrays, tame)


def emptied(g: np.random.Generator, op: str, sizes: dict[str, int]) -> dict[str, int]:
    """Set one or two sizes to 0, and one other size to a huge value if every operand with that size stays empty."""
    zero = set(g.choice(list(sizes), 2))
    lone = {
        size
        for each in operands(op)
        if not zero & set(each.axes)
        for axis in each.axes
        for size in {"Z": "d", "X": "RN"}.get(axis, axis)
    }
    huge = [axis for axis in sizes if axis not in lone and axis not in zero]
    return {**sizes, **dict.fromkeys(zero, 0), **({str(g.choice(huge)): int(g.choice(HUGE))} if huge else {})}


def values(g: np.random.Generator, operand: Operand, shape: Sequence[int], tame: bool) -> NDArray[Any]:
    """Return random values for an operand; unless `tame`, some may be NaN, Inf, denormal or huge."""
    if operand.dtype != "float32":
        limits = np.iinfo(operand.dtype)
        return g.integers(limits.min, limits.max + 1, shape, operand.dtype)
    made = np.asarray(g.standard_normal(shape, np.float32))
    if operand.name == "A" or operand.name.endswith("scale"):
        made = np.abs(made) * np.float32(-1 if operand.name == "A" else 1) + np.float32(operand.name != "A")
    if not tame and g.random() < 0.3:
        at = g.random(shape) < g.choice((0.02, 1.0))
        made = np.where(at, g.choice(np.array(WILD, np.float32), shape), made)
    return np.array(made, np.float32)


def misshapen(g: np.random.Generator, array: NDArray[Any]) -> NDArray[Any]:
    """Return the array with another size on one axis, a huge size beside a zero, or another rank."""
    shape = list(array.shape)
    kind = g.integers(4)
    if kind == 0 or not shape:
        shape.insert(int(g.integers(len(shape) + 1)), 1)
    elif kind == 1:
        shape.pop(int(g.integers(len(shape))))
    elif kind == 2 or len(shape) == 1:
        axis = int(g.integers(len(shape)))
        shape[axis] = max(0, shape[axis] + int(g.choice((-1, 1, 7, -shape[axis]))))
    else:
        shape = [0] * len(shape)
        shape[int(g.integers(len(shape)))] = int(g.choice(HUGE))
    if not array.size or not math.prod(shape):
        return np.ones(shape, array.dtype)
    return np.resize(array, shape)


def wrong(problem: Problem, out: NDArray[Any]) -> str:
    """Describe the error in a result; an empty string if there is none."""
    first = next(iter(problem.arrays.values()))
    if (out.shape, out.dtype) != (first.shape, np.float32):
        return f"the output is {out.dtype} {out.shape}"
    if not np.isnan(out[np.isnan(first)]).all():
        return "a NaN was lost"
    if problem.op == "SelectiveScan" and out.size:
        from evm_deploy.scan.reference import selective_scan

        # Clipped inputs give only the NaNs that come from NaNs, not those from Inf - Inf or 0 * Inf.
        bounded = {name: np.clip(array, -50, 0 if name == "A" else 50) for name, array in problem.arrays.items()}
        want = selective_scan(*bounded.values())
        if not np.isnan(out[np.isnan(want)]).all():
            return "a NaN became a number"
        if problem.tame and not np.allclose(out, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(initial=1.0)):
            return f"off by {np.abs(out - want).max()}"
    elif problem.tame and not np.isfinite(out).all():
        return "NaN or Inf from inputs of moderate size"
    return ""


@cache
def model(op: str, ranks: tuple[int, ...]) -> bytes:
    """Return an ONNX model with one node, whose inputs have the given ranks and any size."""
    from onnx import TensorProto, helper

    kinds = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8}
    inputs = [
        helper.make_tensor_value_info(each.name, kinds[each.dtype], [f"{each.name}{axis}" for axis in range(rank)])
        for each, rank in zip(operands(op), ranks, strict=True)
    ]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    node = helper.make_node(op, [each.name for each in inputs], ["out"], domain="evm")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("evm", 1)]
    proto = helper.make_model(helper.make_graph([node], "one", inputs, [out]), opset_imports=opsets, ir_version=9)
    return bytes(proto.SerializeToString())


def in_onnxruntime(library: Path) -> Callable[[Problem], NDArray[Any]]:
    """Return a function that computes a problem in ONNX Runtime."""
    import onnxruntime as ort

    @cache
    def session(op: str, ranks: tuple[int, ...]) -> Any:
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library))
        options.intra_op_num_threads, options.log_severity_level = 2, 4
        return ort.InferenceSession(model(op, ranks), options, providers=["CPUExecutionProvider"])

    def compute(problem: Problem) -> NDArray[Any]:
        ranks = tuple(array.ndim for array in problem.arrays.values())
        return session(problem.op, ranks).run(None, problem.arrays)[0]

    return compute


def in_openvino(library: Path) -> Callable[[Problem], NDArray[Any]]:
    """Return a function that computes a problem in OpenVINO."""
    import openvino as ov

    core = ov.Core()
    core.add_extension(str(library))

    @cache
    def request(op: str, ranks: tuple[int, ...]) -> Any:
        # With one thread OpenVINO 2026.4.1 does not report errors of dynamic shapes.
        properties = {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "f32"}
        return core.compile_model(core.read_model(model(op, ranks)), "CPU", properties).create_infer_request()

    def compute(problem: Problem) -> NDArray[Any]:
        ranks = tuple(array.ndim for array in problem.arrays.values())
        return np.array(request(problem.op, ranks).infer(problem.arrays)[0])

    return compute


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def run(runtime: str, library: Path, runs: int, seed: int, last: Path) -> dict[str, Any]:
    """Run problems in a process with the sanitizers' libraries; return counts and findings.

    last: file for the description of the current problem, which is read after a crash.
    """
    compute = RUNTIMES[runtime](library)
    counts: Counter[str] = Counter()
    findings = []
    for i, problem in zip(range(runs), problems(seed), strict=False):
        shapes = {name: array.shape for name, array in problem.arrays.items()}
        last.write_text(f"seed {seed}, problem {i}: {problem.op} {shapes}", encoding="utf-8")
        try:
            out = compute(problem)
        except Exception as error:  # each runtime raises its own types
            counts["refused"] += 1
            if problem.fits or f"evm::{problem.op}" not in str(error):
                findings.append(f"{last.read_text()}: {error}")
            continue
        counts["computed"] += 1
        said = wrong(problem, out) if problem.fits else "inputs that do not fit were accepted"
        if said:
            findings.append(f"{last.read_text()}: {said}")
    return {"inputs": runs, **counts, "findings": findings}


def sanitized(runtime: str, folder: Path) -> Path:
    """Compile the runtime's native library with the sanitizers into `folder` and return its path."""
    if runtime == "openvino":
        from evm_deploy.toolchain.openvino_extension import compile_in

        return compile_in(folder, {"CXXFLAGS": " ".join(CHECKED), "LDFLAGS": " ".join(SANITIZE)})
    compiler = Compiler(("g++",), "aarch64" if os.uname().machine == "aarch64" else "x86_64")
    recipe = read_recipe()
    recipe = replace(recipe, words={**recipe.words, "flags": (*recipe.words["flags"], "-Werror", *CHECKED)})
    sources = recipe.words["onnxruntime_sources"]
    library = folder / "evm_onnxruntime.so"
    compiler.run("-shared", *SANITIZE, *compiler.objects(recipe, sources, folder), "-o", library)
    return library


def environment() -> dict[str, str]:
    """Return the environment variables of a process that loads a library with sanitizers."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    options = "detect_leaks=0:allocator_may_return_null=1"  # the runtime reports sizes that are too large
    # oneTBB would open libraries with RTLD_DEEPBIND, which AddressSanitizer refuses.
    tbb = {"TBB_ENABLE_SANITIZERS": "1"}
    return {**os.environ, **tbb, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options}


def attempt(runtime: str, library: Path, runs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Call `run` in a new process; a report of a sanitizer is a finding."""
    command = [sys.executable, "-m", "reliability.operators", runtime, "--inside", str(library)]
    command += ["--runs", str(runs), "--seed", str(seed), "-o", str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.splitlines()
    first = next((i for i, line in enumerate(lines) if "ERROR: " in line or "runtime error" in line), -8)
    at = (folder / "last").read_text(encoding="utf-8")
    return {"inputs": 0, "findings": [f"{at}: exit {done.returncode}: " + "\n".join(lines[first:][:12])]}


def main() -> int:
    """Test the operators in the chosen runtimes; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtimes", nargs="*", metavar="RUNTIME", help=", ".join(RUNTIMES))
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, default=Path("dist/reliability"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # the process of one runtime
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.inside:
        (runtime,) = args.runtimes
        print(json.dumps(run(runtime, args.inside, args.runs, args.seed, args.out / "last")))
        return 0
    results = {}
    for runtime in chosen(parser, args.runtimes, RUNTIMES):
        with tempfile.TemporaryDirectory() as folder:
            library = sanitized(runtime, Path(folder))
            results[runtime] = attempt(runtime, library, args.runs, args.seed, Path(folder))
        print(f"{runtime:<12} {results[runtime]}", flush=True)
    (args.out / "operators.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(each["findings"] for each in results.values()))


if __name__ == "__main__":
    sys.exit(main())
