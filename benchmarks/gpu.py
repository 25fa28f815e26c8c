"""Check and measure the CUDA scan kernel and whole networks on an NVIDIA GPU, in torch, without TensorRT.

    python benchmarks/gpu.py [--limit-s 480]
    python benchmarks/gpu.py --emulate          without a GPU: the same steps on small sizes, on the CPU

Needs nvcc and PyTorch with CUDA; no network connection. The steps, each with a table in Markdown:

    correct    the kernel against the float64 loop, on random shapes, in float32 and float16
    scans      each scan of T at 224x224: time against the time that its bytes take to copy, and against plain torch
    networks   T and B in float16 with the kernel and CUDA graphs, batch 1 and 32, and peers of timm in the same rounds

Peers need timm; without it the script says so. The clock is the GPU's own (CUDA events). Exit code 1 if the kernel is
wrong or a step did not fit in --limit-s. With --emulate, native/tests/cuda_emulator.cpp runs the same kernel source on
the CPU: that finds errors of this script and of the kernel's indices, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleave, where
from torch import Tensor

from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.tensorrt import kernel as geometry
from evm_deploy.scan import reference
from evm_deploy.scan.op import selective_scan
from evm_deploy.scan.portable import two_level_scan

SOURCES = Path(__file__).resolve().parents[1] / "native" / "tests"
PEERS = ("repvit_m0_9", "fastvit_t8", "mobilenetv2_140")
COPIES = 256 << 20  # bytes of the copy that measures the memory, and of the scan inputs that a cache must not hold
LIMITS = {torch.float32: 3e-6, torch.float16: 1e-3}  # error against the float64 loop, relative to the terms of y
EDGES = [(1, 1, 1, 1, 1), (2, 3, 17, 9, 16), (1, 2, 33, 7, 3), (3, 1, 48, 16, 16), (1, 4, 31, 1, 1)]


@dataclass
class Gpu:
    """Device with the scan kernel in `library`: a GPU (nvcc), or its emulation on the CPU (g++).

    seen: shapes (b, K, L, D, N) of the scans since the list was last emptied.
    """

    library: ctypes.CDLL
    emulated: bool
    seen: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def device(self) -> str:
        """Name of the torch device."""
        return "cpu" if self.emulated else "cuda"

    def scan(self, *inputs: Tensor, delta_softplus: bool = True) -> Tensor:
        """Run the kernel on u, delta, A, B, C, skip and bias; shapes as in `scan.reference`. Returns y like u."""
        u, delta, A, B, C, skip, bias = inputs
        data = [x.to(u.dtype).contiguous() for x in (u, delta, B, C)]
        floats = [x.float().contiguous() for x in (A, skip, bias)]
        u, delta, B, C = data
        (batch, K, L, D), N = u.shape, A.shape[2]
        geometry.check_scan(batch, K, D, N)
        self.seen.append((batch, K, L, D, N))
        y = torch.empty_like(u)
        order = (u, delta, floats[0], B, C, floats[1], floats[2])
        arguments = [ctypes.c_void_p(x.data_ptr()) for x in order]
        sizes, half = (L, D, N, ctypes.c_void_p(y.data_ptr())), int(u.dtype == torch.float16)
        if self.emulated:
            grid = (ctypes.c_int32 * 3)(*geometry.grid(batch, K, D))
            self.library.evm_emulate(*arguments, *sizes, half, grid, geometry.THREADS, 0, int(not delta_softplus))
            return y
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        failed = self.library.evm_launch(*arguments, *sizes, half, int(not delta_softplus), K, batch, stream)
        if failed:
            raise RuntimeError(f"the kernel was not launched: CUDA error {failed}")
        return y

    def register(self) -> None:
        """Make the torch op of the networks run the kernel on this device."""

        def run(u, delta, A, B, C, skip, bias, delta_softplus=True):  # type: ignore[no-untyped-def]
            return self.scan(u, delta, A, B, C, skip, bias, delta_softplus=delta_softplus)

        selective_scan.register_kernel(self.device)(run)

    def graphed(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Capture `run` in a CUDA graph. Returns the function that replays the graph."""
        if self.emulated:
            return run
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def times(self, subjects: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Measure each subject in ms, in turn, with CUDA events; in an emulation with the clock of the CPU."""
        if self.emulated:
            return interleave(subjects, 2, warm_up=0)
        times: dict[str, list[float]] = {name: [] for name in subjects}
        for i in range(3 + rounds):
            for name, run in subjects.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                run()
                start.record()
                run()
                end.record()
                end.synchronize()
                if i >= 3:
                    times[name].append(start.elapsed_time(end))
        return times


def build(folder: Path, emulated: bool) -> Gpu:
    """Compile the kernel in `folder`, for this machine's GPU or for emulation. Raises CalledProcessError."""
    library = folder / "scan.so"
    shared = ("-std=c++17", "-shared")
    if emulated:
        flags, source = ("-O1", "-fPIC", "-Wno-unknown-pragmas"), "cuda_emulator.cpp"
    else:
        major, minor = torch.cuda.get_device_capability()
        flags, source = ("-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}"), "cuda_launch.cu"
    compiler = "g++" if emulated else "nvcc"
    subprocess.run([compiler, *shared, *flags, str(SOURCES / source), "-o", str(library)], check=True)
    return Gpu(ctypes.CDLL(str(library)), emulated)


def random_inputs(seed: int, sizes: Sequence[int], spread: float = 1.0) -> list[Tensor]:
    """Return random inputs of a scan of (b, K, L, D, N), float32 on the CPU."""
    b, K, L, D, N = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, K, L, D), (b, K, L, D), (K, D, N), (b, K, L, N), (b, K, L, N), (K, D), (K, D))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[1] *= spread
    inputs[2] = -inputs[2].exp()
    return inputs


def error(gpu: Gpu, inputs: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Return the largest error of the kernel against the float64 loop, relative to the terms that y adds up."""
    rounded = [x if i in (2, 5, 6) else x.to(dtype).float() for i, x in enumerate(inputs)]
    there = [x.to(gpu.device, torch.float32 if i in (2, 5, 6) else dtype) for i, x in enumerate(inputs)]
    got = gpu.scan(*there).double().cpu().numpy()
    arrays = [x.numpy() for x in rounded]
    terms = [a if i in (1, 2, 6) else np.abs(a) for i, a in enumerate(arrays)]
    off = np.abs(got - reference.selective_scan(*arrays))
    return float((off / np.abs(reference.selective_scan(*terms)).max()).max())


def check_kernel(gpu: Gpu) -> bool:
    """Print the largest error over random shapes. Returns whether all are within LIMITS; NaN is not."""
    count, highest = (6, (2, 3, 40, 20, 16)) if gpu.emulated else (60, (4, 4, 300, 200, 16))
    g = np.random.default_rng(0)
    sizes = [*EDGES, *(tuple(int(g.integers(1, high + 1)) for high in highest) for _ in range(count))]
    print(f"\n| kernel, {len(sizes)} shapes | largest error against float64 | limit |\n|---|---|---|")
    right = True
    for dtype, limit in LIMITS.items():
        errors = [error(gpu, random_inputs(i, each, (0.1, 3.0, 30.0)[i % 3]), dtype) for i, each in enumerate(sizes)]
        worst = float(np.max(errors))  # NaN if any is
        right &= worst <= limit  # False for NaN
        print(f"| {_name(dtype)} | {worst:.1e} | {limit:.0e} |")
    return right


def scan_bytes(sizes: Sequence[int], itemsize: int) -> int:
    """Return the bytes that a scan of (b, K, L, D, N) must read and write at least."""
    b, K, L, D, N = sizes
    return itemsize * b * K * L * (3 * D + 2 * N) + 4 * K * D * (N + 2)


def measure_scans(gpu: Gpu, scans: Sequence[tuple[int, ...]], rounds: int) -> None:
    """Print the time of each scan beside that of a copy of its bytes, and of plain torch in float32."""
    source = torch.empty(COPIES if not gpu.emulated else 1 << 16, dtype=torch.uint8, device=gpu.device)
    target = torch.empty_like(source)
    copy_ms = statistics.median(gpu.times({"copy": lambda: target.copy_(source)}, rounds)["copy"])
    rate = 2 * source.numel() / copy_ms  # bytes per ms, read and written
    print(f"\nmemory: a copy reads and writes {rate / 1e6:.0f} GB/s\n")
    print("| scan (b, K, L, D, N) | dtype | kernel us | bytes us | kernel / bytes | plain torch us | torch / kernel |")
    print("|---|---|---|---|---|---|---|")
    for sizes in scans:
        for dtype in (torch.float16, torch.float32):
            moved = scan_bytes(sizes, dtype.itemsize)
            held = [x.to(gpu.device) for x in random_inputs(0, sizes)]
            one = [x if i in (2, 5, 6) else x.to(dtype) for i, x in enumerate(held)]
            sets = [[x.clone() for x in one] for _ in range(1 if gpu.emulated else max(1, min(512, COPIES // moved)))]

            def run(sets: list[list[Tensor]] = sets) -> None:
                for inputs in sets:
                    gpu.scan(*inputs)

            subjects = {"kernel": gpu.graphed(run), "torch": gpu.graphed(lambda held=held: two_level_scan(*held))}
            times = {name: statistics.median(each) for name, each in gpu.times(subjects, rounds).items()}
            kernel, floor, plain = times["kernel"] / len(sets), moved / rate, times["torch"]
            row = (sizes, _name(dtype), f"{1e3 * kernel:.1f}", f"{1e3 * floor:.1f}", f"{kernel / floor:.1f}")
            print("| " + " | ".join(map(str, (*row, f"{1e3 * plain:.1f}", f"{plain / kernel:.1f}"))) + " |")


def networks(gpu: Gpu) -> dict[str, tuple[torch.nn.Module, int]]:
    """Return the networks to measure with their image size: EfficientVMamba with seeded weights, and peers of timm."""
    import golden

    found: dict[str, tuple[torch.nn.Module, int]] = {}
    cases = {"micro": ("micro_64", 64)} if gpu.emulated else {"T": ("tiny_224", 224), "B": ("base_224", 224)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (case, side) in cases.items():
            state = {key: torch.from_numpy(value) for key, value in golden.model_case(case)["state"].items()}
            torch.save({"state_dict": state}, Path(folder) / f"{name}.pth")
            found[name] = load_checkpoint(Path(folder) / f"{name}.pth").module, side
    try:
        import timm
        from timm.utils.model import reparameterize_model
    except ImportError as problem:
        print(f"\npeers are not measured: {problem}; install timm")
        return found
    for name in PEERS if not gpu.emulated else PEERS[-1:]:
        found[name] = reparameterize_model(timm.create_model(name).eval()), 64 if gpu.emulated else 224
    return found


@torch.inference_mode()
def measure_networks(gpu: Gpu, found: dict[str, tuple[torch.nn.Module, int]], rounds: int) -> None:
    """Print the time of every network per batch, in float16 with CUDA graphs, and its error against float32."""
    print("\n| network, float16, CUDA graph | batch | ms | images/s | error against float32 |\n|---|---|---|---|---|")
    halves = {name: copy.deepcopy(module).to(gpu.device, torch.float16) for name, (module, _) in found.items()}
    for batch in (1,) if gpu.emulated else (1, 32):
        subjects, errors = {}, {}
        for name, (module, side) in found.items():
            images = torch.randn((batch, 3, side, side), generator=torch.Generator().manual_seed(0)).to(gpu.device)
            want = _first(module.to(gpu.device)(images))
            run = functools.partial(halves[name], images.half())
            errors[name] = float((_first(run()).float() - want).abs().max() / want.abs().max().clamp(min=1))
            subjects[name] = gpu.graphed(run)
        for name, each in gpu.times(subjects, rounds).items():
            ms = statistics.median(each)
            print(f"| {name} | {batch} | {ms:.3f} | {1e3 * batch / ms:.0f} | {errors[name]:.1e} |")


def _first(outputs: Any) -> Tensor:
    """Return the first tensor of a network's outputs."""
    while not isinstance(outputs, Tensor):
        outputs = next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    return outputs


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine(emulated: bool) -> str:
    """Return date, GPU, driver and versions, for the first line."""
    if emulated:
        return f"{where()}, EMULATED: times mean nothing, torch {torch.__version__}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    versions = f"driver {driver}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    return f"{where()}, {torch.cuda.get_device_name()}, {versions}"


@contextmanager
def deadline(limit_s: float) -> Iterator[Callable[[str], bool]]:
    """Context manager that gives a function `in_time(step)`: whether a step may begin; it says so if not."""
    start = time.monotonic()

    def in_time(step: str) -> bool:
        spent = time.monotonic() - start
        if spent > limit_s:
            print(f"\n{step} left out: {spent:.0f} s are over, of --limit-s {limit_s:g}", file=sys.stderr)
        return spent <= limit_s

    yield in_time


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulate", action="store_true", help="run the steps on small sizes on the CPU, without a GPU")
    parser.add_argument("--rounds", type=int, default=50, help="measurements of each subject, default 50")
    parser.add_argument("--limit-s", type=float, default=480.0, help="begin no step after this time, default 480")
    args = parser.parse_args()
    if not args.emulate and not torch.cuda.is_available():
        print("torch finds no GPU; --emulate checks the script without one", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, deadline(args.limit_s) as in_time:
        print(machine(args.emulate))
        gpu = build(Path(folder), args.emulate)
        right, complete = check_kernel(gpu), in_time("networks")
        gpu.register()
        found = networks(gpu) if complete else {}
        if complete:
            measure_networks(gpu, found, args.rounds)
            gpu.seen.clear()
            module, side = next(iter(found.values()))
            with torch.inference_mode():
                module(torch.zeros((1, 3, side, side), device=gpu.device))
        if complete and in_time("scans"):
            scans = sorted(set(gpu.seen), reverse=True)
            measure_scans(gpu, scans if gpu.emulated else [*scans, *((32, *each[1:]) for each in scans)], args.rounds)
        else:
            complete = False
    print("\n" + ("PASSED" if right and complete else "FAILED"))
    return 0 if right and complete else 1


if __name__ == "__main__":
    sys.exit(main())
