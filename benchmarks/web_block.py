"""Compare our block kernel as WebAssembly with ONNX Runtime Web: one fused block of a bundle, in Node, one thread.

    python benchmarks/web_block.py BUNDLE.. [--rounds 15]

ONNX Runtime Web runs the portable graph of the block. Kernel and runtime run in turn; the script prints the medians and
the ratios of the rounds. `simd`: plain SIMD of 128 bits; `relaxed`: relaxed SIMD, which has a fused multiply-add. One
block is measured for each shape.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import ratio, where
from onnx import helper, inliner, numpy_helper, shape_inference

from evm_deploy.bundle.loaded import load
from evm_deploy.toolchain.cross_compile import zig_compiler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.web import modules

HERE = Path(__file__).resolve().parent
SCAN = HERE.parent / "native" / "scan"
SIMD = {"simd": ("-msimd128",), "relaxed": ("-msimd128", "-mrelaxed-simd", "-ffp-contract=fast")}
BASE = ("-DEVM_ISA=base", "-DEVM_LANES=4", "-DEVM_STATES=8", "-DEVM_ACCUMULATORS=12")
EXPORTS = ("sizes", "input", "prepare", "run")


def compile_kernels(folder: Path) -> None:
    """Compile the kernel to WebAssembly, `simd.wasm` and `relaxed.wasm`."""
    compiler = zig_compiler("wasm32-wasi", "other", folder / "zig")
    flags = (
        "-std=c++17",
        "-O3",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-math-errno",
        "-nostdlib++",
        "-mexec-model=reactor",
    )
    sources = [HERE / "web_block.cpp", SCAN / "dispatch.cpp", SCAN / "scan.cpp", SCAN / "block.cpp"]
    exports = [f"-Wl,--export={name}" for name in EXPORTS]
    for name, simd in SIMD.items():
        compiler.run(*flags, *BASE, *simd, f"-I{SCAN}", *sources, *exports, "-o", folder / f"{name}.wasm")


def blocks(path: Path) -> dict[tuple[int, ...], tuple[onnx.ModelProto, list[np.ndarray]]]:
    """Return the fused blocks of a model by shape (b, H, W, C): their portable graph as a model, and the operands."""
    model = shape_inference.infer_shapes(onnx.load(path))
    shapes = {
        each.name: [side.dim_value for side in each.type.tensor_type.shape.dim] for each in model.graph.value_info
    }
    constants = {each.name: each for each in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "EVSSBlock" or tuple(shape := shapes[node.input[0]]) in found:
            continue
        renamed = onnx.NodeProto()
        renamed.CopyFrom(node)
        renamed.input[0], renamed.output[:] = "x", ["out"]
        value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "out")]
        operands = [constants[name] for name in node.input[1:]]
        graph = helper.make_graph([renamed], "block", value[:1], value[1:], operands)
        alone = helper.make_model(
            graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
        )
        found[tuple(shape)] = inliner.inline_local_functions(alone), [numpy_helper.to_array(each) for each in operands]
    return found


def measured(shape: tuple[int, ...], block: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """Return times in ms and errors of a block, by subject."""
    model, operands = block
    onnx.save(model, folder / "block.onnx")
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (d, N), R, G = operands[7].shape[1:], operands[6].shape[1], operands[20].shape[0]
    sizes = {"sizes": [*shape, d, N, R, G], "inputs": [x.size, *(each.size for each in operands)]}
    (folder / "block.json").write_text(json.dumps(sizes))
    (folder / "arrays").write_bytes(
        b"".join(np.ascontiguousarray(each, np.float32).tobytes() for each in (x, *operands))
    )
    runtime = modules() / "onnxruntime-web" / "dist" / "ort.node.min.mjs"
    command = ["node", "--experimental-wasm-relaxed-simd", HERE / "web_block.mjs", folder, runtime, str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(where())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compile_kernels(folder)
        for bundle in args.bundles:
            with load(bundle, scan="portable") as opened:
                model = opened.bundle.path / opened.manifest.artifact
                for shape, block in blocks(model).items():
                    found = measured(shape, block, folder, args.rounds)
                    print(f"block {'x'.join(map(str, shape))} of {opened.manifest.name}")
                    for subject, times in found["times"].items():
                        _, text = ratio(found["times"], "runtime", subject)
                        error = found["error"][subject]
                        print(f"  {subject:8} {np.median(times):8.2f} ms   runtime / it {text}   max|d| {error:.1e}")


if __name__ == "__main__":
    main()
