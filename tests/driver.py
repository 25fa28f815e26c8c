"""native/tests/driver.cpp from Python: scans and blocks in, what the kernels computed out. Random problems for it."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evm_deploy.scan import reference
from evm_deploy.scan.native import without_native_scan
from evm_deploy.toolchain.compile import Compiler, parse_recipe, read_recipe
from tests.test_fused import image, in_float64, random_block
from tests.test_fused_int8 import exact_block
from tests.test_native import magnitudes, random_scan

NATIVE = Path(__file__).parents[1] / "native"
SOURCE = NATIVE / "tests" / "driver.cpp"


@dataclass(frozen=True)
class Problem:
    """A call of the driver.

    op: 0 scan, 1 block, 2 int8 block, 3 int8 block with an int8 x_proj, 4 block in bfloat16, 5 in float16. sizes,
    arrays: in the order of the struct. outputs: shapes of the results.
    """

    op: int
    sizes: tuple[int, ...]
    arrays: Sequence[np.ndarray]
    outputs: Sequence[tuple[int, ...]]

    def to_bytes(self) -> bytes:
        kept = (np.int8, np.uint8)
        arrays = [np.asarray(a, a.dtype if a.dtype in kept else np.float32).tobytes() for a in self.arrays]
        return b"".join([np.array([self.op, len(self.outputs), *self.sizes], np.int64).tobytes(), *arrays])

    @property
    def inference(self) -> Problem:
        """The same without the outputs for verification, which have code of their own."""
        return replace(self, outputs=self.outputs[:1])


def scan_problem(arrays):
    (b, K, L, D), N = arrays[0].shape, arrays[2].shape[2]
    return Problem(0, (b, K, L, D, N), arrays, [(b, K, L, D)])


def block_problem(arrays, b, H, W, C, d, N, R, G):
    scan = (b, 4, (H + 1) // 2 * ((W + 1) // 2))
    outputs = [(b, H, W, C), (*scan, d), (*scan, d), (*scan, N), (*scan, N), (*scan, d)]
    return Problem(1, (b, H, W, C, d, N, R, G), arrays, outputs)


def int8_block_problem(x, operands):
    """operands: of evm::EVSSBlockInt8 or evm::EVSSBlockInt8XProj."""
    (b, H, W, C), (d, N), R = x.shape, operands["A"].shape[1:], operands["dt_proj"].shape[1]
    float_problem = block_problem([], b, H, W, C, d, N, R, len(operands["gate_reduce_bias"]))
    op = 3 if "x_proj_scale" in operands else 2
    return replace(float_problem, op=op, arrays=[x, *operands.values()])


def any_block(seed, b, H, W, C, d, N, R, G):
    """A block of widths that need not belong together, on random arrays of moderate size."""
    g = np.random.default_rng(seed)
    shapes = [
        (b, H, W, C), (C,), (C,), (C, 2 * d), (d, 9), (d,), (4, d, R + 2 * N), (4, R, d), (4, d, N), (4, d), (4, d),
        (d,), (d,), (d, C), (C, 9), (C,), (C, C), (C,), (C,), (C,), (C, G), (G,), (G, C), (C,),
    ]  # fmt: skip
    arrays = [g.standard_normal(shape) / max(1, shape[-1]) ** 0.5 for shape in shapes]
    arrays[8] = -np.exp(g.standard_normal(shapes[8]))
    return block_problem(arrays, b, H, W, C, d, N, R, G)


def any_int8_block(seed, *sizes, x_proj=True):
    """`any_block` with int8 linear layers, and x_proj among them or not."""
    problem, arrays, g = any_block(seed, *sizes), [], np.random.default_rng(seed)
    largest = (127, 64)[seed % 2]
    for i, array in enumerate(problem.arrays):
        if i not in (3, *((6,) if x_proj else ()), 13, 16):  # in_proj, x_proj, out_proj, local_proj_weight
            arrays.append(array)
            continue
        columns = (*array.shape[:-2], 1, array.shape[-1])  # one scale for each column of each matrix
        scale = np.full(columns, max(1e-6, np.abs(array).max(initial=0) / largest))
        zero_point = np.array(g.integers(256), np.uint8)
        arrays += [np.round(array / scale).astype(np.int8), scale, np.array(0.03), zero_point]
    return replace(problem, op=3 if x_proj else 2, arrays=arrays)


@dataclass(frozen=True)
class Driver:
    """A built driver. command: what runs it, an emulator included. isa: value of EVM_ISA; empty for the best."""

    command: tuple[str, ...]
    isa: str = ""

    def forced(self, isa: str) -> Driver:
        return Driver(self.command, isa)

    def run(self, problems: Sequence[Problem]) -> list[list[np.ndarray]]:
        """The outputs of each problem. Fails with what the driver says, and where an inference gives other bits."""
        results, blocks = self._run(problems), [i for i, problem in enumerate(problems) if len(problem.outputs) > 1]
        inferences = self._run([problems[i].inference for i in blocks])
        for i, (out,) in zip(blocks, inferences, strict=True):
            np.testing.assert_array_equal(out, results[i][0], err_msg=f"{problems[i].op} {problems[i].sizes}")
        return results

    def _run(self, problems: Sequence[Problem]) -> list[list[np.ndarray]]:
        environment = {**os.environ, "EVM_ISA": self.isa}
        sent = b"".join(problem.to_bytes() for problem in problems)
        done = subprocess.run(self.command, input=sent, capture_output=True, env=environment)
        assert done.returncode == 0, f"{self.command} exit {done.returncode}: {done.stderr.decode()[:2000]}"
        values, results, at = np.frombuffer(done.stdout, np.float32), [], 0
        for problem in problems:
            results.append([])
            for shape in problem.outputs:
                size = int(np.prod(shape))
                results[-1].append(values[at : at + size].reshape(shape))
                at += size
        assert at == len(values)
        return results


def build_driver(
    compiler: Compiler, folder: Path, flags: Sequence[str] = (), link: Sequence[str] = (), native: Path = NATIVE
) -> Path:
    """The driver with all kernels inside. `flags`: after those of kernels.txt."""
    recipe = parse_recipe(native)
    recipe = replace(recipe, words={**recipe.words, "flags": (*recipe.words["flags"], "-Werror", *flags)})
    objects = compiler.objects(recipe, [SOURCE], folder)
    compiler.run(*link, *objects, "-o", folder / "driver")
    return folder / "driver"


def driver_of_installed_kernels(folder: Path) -> Path:
    """The driver with the kernels as they are installed, static."""
    recipe, compiler = read_recipe(), Compiler(("g++",), "x86_64")
    objects = compiler.objects(recipe, [SOURCE], folder, recipe.archive(compiler.architecture))
    compiler.run("-static", *objects, "-o", folder / "driver")
    return folder / "driver"


def check_random_scans(driver: Driver, count: int) -> None:
    """Any shape, against the float64 loop. Every other scan has one or two states, which have a loop of their own."""
    g = np.random.default_rng(7)
    spreads = (0.1, 3.0, 30.0)
    problems = [
        scan_problem(
            random_scan(
                i, *(int(g.integers(1, high + 1)) for high in (3, 4, 70, 40, 140 if i % 2 else 2)), spreads[i % 3]
            )
        )
        for i in range(count)
    ]
    for problem, (y,) in zip(problems, driver.run(problems), strict=True):
        want = reference.selective_scan(*problem.arrays)
        terms = reference.selective_scan(*magnitudes(*problem.arrays))
        assert np.abs(y - want).max() <= 3e-6 * terms.max(), problem.sizes


def hard_scans() -> list[Problem]:
    """Scans with delta up to 20, with one large dt among small ones, and with a NaN in each input in turn."""
    problems = []
    for states in (1, 2, 3, 8, 16, 66):
        sizes = (1, 2, 37, 50, states)
        large = random_scan(states, *sizes)
        large[1] = np.random.default_rng(states).uniform(-10, 20, large[1].shape)
        large[2][:] = -1 - np.arange(states) % 16
        one = random_scan(states, *sizes, spread=0.1)
        one[1][0, 1, 34, 7], one[2][1, 7] = 20, -16
        problems += [scan_problem(large), scan_problem(one)]
        for i in range(len(one)):
            spoilt = random_scan(states, *sizes, spread=0.1)
            spoilt[i].reshape(-1)[spoilt[i].size // 2] = np.nan
            problems.append(scan_problem(spoilt))
    return problems


def check_hard_scans(driver: Driver) -> None:
    """`hard_scans` against the float64 loop: NaN where the loop has NaN, and nowhere else."""
    problems = hard_scans()
    for problem, (y,) in zip(problems, driver.run(problems), strict=True):
        want = reference.selective_scan(*problem.arrays)
        terms = reference.selective_scan(*magnitudes(*problem.arrays))
        np.testing.assert_array_equal(np.isnan(y), np.isnan(want), err_msg=str(problem.sizes))
        assert np.nanmax(np.abs(y - want)) <= 3e-6 * np.nanmax(terms), problem.sizes


#: Kernel -> type of the products of a block in half precision. Type -> op of the driver.
HALVES = {"avx512bf16": torch.bfloat16, "fp16": torch.float16, "i8mm": torch.float16}
IN_HALF = {torch.bfloat16: 4, torch.float16: 5}


def product_in_half(x: torch.Tensor, weight: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """Multiply x (.., K) by weight (.., K, columns), both rounded to `half`.

    Products of float16 are summed in float16 over 64 rows, even and odd ones apart, all others exactly.
    """

    def rounded(value):
        return value.to(half).to(value.dtype)

    x, weight = rounded(x), rounded(weight)
    if half != torch.float16:
        return x @ weight
    total, depth = 0, x.shape[-1]
    for begin in range(0, depth, 64):
        sums = [torch.zeros(()), torch.zeros(())]
        for k in range(begin, min(begin + 64, depth)):
            sums[k % 2] = rounded(sums[k % 2] + x[..., k : k + 1] * weight[..., k : k + 1, :])
        total = total + sums[0] + sums[1]
    return total


def in_half(block: torch.nn.Module, half: torch.dtype) -> torch.nn.Module:
    """Let the linear layers of a block multiply in `half`. Returns the block."""
    op, local = block.op, block.conv_branch[3]
    for layer in (op.in_proj, op.out_proj):
        layer.forward = lambda x, weight=layer.weight.T: product_in_half(x, weight, half)
    op.project = lambda u: product_in_half(u, op.x_proj_weight.transpose(1, 2), half)
    weight = local.weight[:, :, 0, 0].T
    local.forward = lambda x: (product_in_half(x.movedim(1, -1), weight, half) + local.bias).movedim(-1, 1)
    return block


def check_half_blocks(driver: Driver, count: int, kernel: str) -> None:
    """Against the torch module in float64 whose linear layers round to HALVES, or do not where the kernel cannot.

    A value on the other side of a rounding boundary differs by a step, and all that follows from it: every output must
    be within some steps, and most blocks must be much closer to the rounded module than that is to the exact one.
    """
    g = np.random.default_rng(9)
    half, problems, rounded, exact = HALVES.get(kernel), [], [], []
    for i in range(count):
        b, H, W, dim, rank = (int(g.integers(low, high)) for low, high in ((1, 3), (1, 14), (1, 14), (8, 50), (1, 9)))
        states = int(g.integers(1, 80))
        block, x = random_block(i, dim, rank, states), image(i, b, H, W, dim)
        operands = [operand.numpy() for operand in block.fused_op().operands.values()]
        float_problem = block_problem([x, *operands], b, H, W, dim, 2 * dim, states, rank, dim // 8)
        problems.append(float_problem)
        with torch.inference_mode(), without_native_scan():
            exact.append(in_float64(block, x))
            if half:
                rounded.append(in_half(copy.deepcopy(block).double(), half)(torch.from_numpy(x).double()).numpy())
    for other in IN_HALF.keys() - {half}:
        for (out, *_), plain in zip(driver.run([replace(p, op=IN_HALF[other]) for p in problems]), exact, strict=True):
            assert np.abs(out - plain).max() <= 1e-5 * np.abs(plain).max()
    if not half:
        return
    shares, results = [], driver.run([replace(p, op=IN_HALF[half]) for p in problems])
    for (out, *_), want, plain in zip(results, rounded, exact, strict=True):
        assert np.abs(out - want).max() <= 12 * torch.finfo(half).eps * np.abs(want).max()
        shares.append(np.abs(out - want).mean() / np.abs(plain - want).mean())
    assert np.median(shares) < 0.2, shares


def check_random_blocks(driver: Driver, count: int) -> None:
    """Against the torch module in float64, its scan against the float64 loop."""
    g = np.random.default_rng(8)
    problems, wanted = [], []
    for i in range(count):
        b, H, W, dim, rank = (int(g.integers(low, high)) for low, high in ((1, 3), (1, 14), (1, 14), (8, 50), (1, 9)))
        states = int(g.integers(1, 80))
        block, x = random_block(i, dim, rank, states, (0.1, 1.0, 5.0)[i % 3]), image(i, b, H, W, dim)
        operands = [operand.numpy() for operand in block.fused_op().operands.values()]
        problems.append(block_problem([x, *operands], b, H, W, dim, 2 * dim, states, rank, dim // 8))
        with torch.inference_mode(), without_native_scan():
            wanted.append(in_float64(block, x))
    for problem, want, (out, *scan) in zip(problems, wanted, driver.run(problems), strict=True):
        assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max(), problem.sizes
        u, delta, B, C, y = scan
        A, skip, bias = problem.arrays[8:11]
        loop = reference.selective_scan(u, delta, A, B, C, skip, bias)
        terms = reference.selective_scan(*magnitudes(u, delta, A, B, C, skip, bias))
        assert np.abs(y - loop).max() <= 3e-6 * terms.max(), problem.sizes


def check_exact_int8_blocks(driver: Driver, count: int) -> None:
    """The same bits as integer arithmetic gives, at depths beyond 512 and 2^24 too."""
    problems, wanted = [], []
    for i in range(count):
        x, operands, *want = exact_block(i, x_proj=i % 4 > 0)
        problems.append(int8_block_problem(x, operands))
        wanted.append(want)
    for want, (out, u, _, *states, _) in zip(wanted, driver.run(problems), strict=True):
        for one, other in zip(want, (out, np.maximum(u, 0), *states), strict=True):
            np.testing.assert_array_equal(other, one)
