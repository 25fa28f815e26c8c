"""Count the static cost of engines that TensorRT-RTX builds from portable graphs without a GPU; no latency is measured.

    python benchmarks/tensorrt_static.py [--imgsz 224]

For each network and precision the script prints the number of kernels, how many of them have an int8 first input, the
bytes that all kernels read and write, the size of the engine, and the seconds of the build; then the same for single
scans, by steps per chunk. The int8 ranges are arbitrary: only the structure of the engine matters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import where
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "golden"))
import golden

from evm_deploy.export.tensorrt.layers import read_kernels, traffic_bytes
from tests.tensorrt import engine, network, scan_model, traced

NETWORKS = [(f"{v}_224", p) for v in ("tiny",) for p in ("fp32", "fp16", "int8", "int8-fp16")] + [("base_224", "fp16")]
SCANS = [(784, 96, 14), (784, 96, 28), (196, 192, 7), (196, 192, 14)]  # L, D, steps per chunk


def print_engine(name: str, model, folder: Path) -> None:
    """Build an engine and print its static cost."""
    start = time.perf_counter()
    done = engine(model, folder)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    kernels = read_kernels((folder / "layers.txt").read_text())
    int8 = sum(kernel.kind != "kgen" and kernel.inputs[0].dtype == "Int8" for kernel in kernels)
    size, traffic = (folder / "model.engine").stat().st_size, traffic_bytes(kernels)
    print(
        f"{name:<22} {len(model.graph.node):>5} nodes {len(kernels):>4} kernels {int8:>3} int8 "
        f"{traffic / 1e6:>6.1f} MB traffic {size / 1e6:>6.1f} MB engine {seconds:>5.1f} s"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imgsz", type=int, default=224)
    size = parser.parse_args().imgsz
    print(where())
    with tempfile.TemporaryDirectory() as folder:
        for L, D, steps in SCANS:
            model = scan_model(1, 4, L, D, 16, steps)
            print_engine(f"scan {L}x{D}, {steps} steps", model, Path(folder) / f"{L}-{steps}")
        for case, precision in NETWORKS:
            weights = Path(folder) / f"{case}.safetensors"
            if not weights.exists():
                save_file(golden.model_case(case)["state"], weights)
            calib = "demo" if "int8" in precision else None
            graph, plan = traced(weights, (size, size), precision=precision, calib=calib, scan="portable")
            model, _ = network(graph, plan)
            print_engine(f"{case.split('_')[0]} {size} {precision}", model, Path(folder) / f"{case}-{precision}")


if __name__ == "__main__":
    main()
