"""Compare two int8 EfficientVMambas in OpenVINO: the Q/DQ graph of evm-export, and NNCF applied to the float IR.

    pip install nncf
    python benchmarks/openvino_int8.py [--images 300]

First the trained T of ../shared/trained at 64x64: accuracy of both on 2000 evaluation images; both are calibrated with
the same other images. Then T at 224x224 with seeded weights: latency of both and of float32, one thread, interleaved.
NNCF gets an IR with one node per scan and the other layers in OpenVINO's operators, because it could not quantise
inside a block that is one node. NNCF leaves additions, products, concatenations and means in float.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from common import interleave, ratio, where
from int8_methods import CALIBRATION_SEED, TRAINED, VALIDATION_SEED
from openvino_models import compiled, hub, runner, scan_nodes
from PIL import Image

from evm_deploy import load
from evm_deploy.calib.evaluate import compare_outputs
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.openvino.ir import convert
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.tasks.classification import CLASSIFICATION
from evm_deploy.toolchain.openvino_extension import extension

FLOAT_TYPES = ["Add", "Multiply", "Concat", "ReduceSum", "ReduceMean"]


@dataclass(frozen=True)
class Made:
    """Result of NNCF: the IR, the seconds, and the peak memory in MB of the process, which did nothing else."""

    model: Path
    seconds: float
    peak: float


def with_nncf(model: Any, images: np.ndarray, folder: Path) -> Made:
    """Quantise a float model with NNCF in a new process."""
    ov.save_model(model, folder / "float.xml", compress_to_fp16=False)
    np.save(folder / "images.npy", images)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(quantize_with_nncf, folder).result()


def quantize_with_nncf(folder: Path) -> Made:
    """Quantise the IR in `folder` with NNCF, in this process."""
    import nncf

    nncf.set_log_level("ERROR")
    core = ov.Core()
    core.add_extension(str(extension()))
    model, images = core.read_model(folder / "float.xml"), np.load(folder / "images.npy")
    start = time.perf_counter()
    scope = nncf.IgnoredScope(types=FLOAT_TYPES, validate=False)
    data = nncf.Dataset(list(images), lambda image: {"image": image[None]})
    quantized = nncf.quantize(model, data, subset_size=len(images), ignored_scope=scope)
    seconds = time.perf_counter() - start
    ov.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)
    return Made(folder / "nncf.xml", seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def outputs(request: Any, images: np.ndarray) -> np.ndarray:
    """Run the images one by one and return their outputs."""
    return np.concatenate([request.infer({"image": image[None]})[0].copy() for image in images])


def rows(images: np.ndarray, run: Any) -> Iterator[np.ndarray]:
    """Run the images one by one and yield their logits."""
    for image in images:
        yield run({"image": image[None]})["logits"]


def accuracy(core: Any, folder: Path, count: int) -> None:
    """Print the accuracy of the trained T with both methods."""
    from glyphs import glyphs

    calibration, _ = glyphs(count, CALIBRATION_SEED, 64)
    images, labels = glyphs(2000, VALIDATION_SEED, 64)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / "val" / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(folder / "calib.npz", images=calibration)
    checkpoint = TRAINED / "evm_tiny_glyphs64.ckpt"
    plan = ExportPlan("openvino", imgsz=(64, 64), crop_pct=1.0)
    float_model = convert(core, scan_nodes(hub(checkpoint, plan)))
    want = {"logits": outputs(compiled(core, float_model), images)}
    nncf = with_nncf(float_model, calibration, folder)
    named = {"logits": outputs(compiled(core, nncf.model), images)}
    judged = compare_outputs(want, named, CLASSIFICATION, labels)
    print(f"NNCF  {judged}   {nncf.seconds:.0f} s for {count} images, peak memory {nncf.peak:.0f} MB")
    int8 = ExportPlan("openvino", imgsz=(64, 64), crop_pct=1.0, precision="int8", calib=str(folder / "calib.npz"))
    with load(export(checkpoint, int8, folder / "out").path, threads=1) as model:
        ours = {"logits": np.concatenate(list(rows(images, model.run)))}
    print(f"Q/DQ  {compare_outputs(want, ours, CLASSIFICATION, labels)}")


def speed(core: Any, folder: Path, rounds: int) -> None:
    """Print the latency of T at 224x224 with both methods and in float32."""
    import golden

    state = golden.model_case("tiny_224")["state"]
    checkpoint = folder / "evm_tiny.pth"
    torch.save({"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, checkpoint)
    images = np.stack([synthetic_image(224, 224, seed=i) for i in range(104)])
    np.savez(folder / "images.npz", images=images)
    plan = ExportPlan("openvino", imgsz=(224, 224), scan="plugin")
    int8 = ExportPlan("openvino", imgsz=(224, 224), scan="plugin", precision="int8", calib=str(folder / "images.npz"))
    float_model = convert(core, scan_nodes(hub(checkpoint, plan)))
    models = {
        "float32": export(checkpoint, plan, folder / "a").path / "model.xml",
        "Q/DQ": export(checkpoint, int8, folder / "b").path / "model.xml",
        "NNCF": with_nncf(float_model, images[:40], folder).model,
    }
    feeds = {"image": images[:1]}
    times = interleave({key: runner(compiled(core, model), feeds) for key, model in models.items()}, rounds)
    for key in models:
        print(f"float32 / {key:<8} {ratio(times, 'float32', key)[1]}  median {statistics.median(times[key]):.1f} ms")


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="number of calibration images")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not TRAINED.is_dir():
        print(f"{TRAINED} not found", file=sys.stderr)
        return 2
    sys.path.insert(0, str(TRAINED))
    core = ov.Core()
    core.add_extension(str(extension()))
    print(f"{where()}, OpenVINO {ov.__version__.split('-')[0]}")
    with tempfile.TemporaryDirectory() as folder:
        accuracy(core, Path(folder), args.images)
        speed(core, Path(folder), args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
