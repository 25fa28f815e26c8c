"""Evaluate Core ML packages without a Mac: error against the golden logits, size, static cost, time of conversion.

    python benchmarks/coreml.py --variant T                     float32, float16 and w8 of seeded weights; S, B, odd
    python benchmarks/coreml.py --sizes 192,224,256             T in float16, one package for all against one for each
    python benchmarks/coreml.py --trained ../shared/trained     top-1 of the trained T: float16, w8, int8

The packages run in the MIL runtime, with one thread. The static cost is counted, not measured: it ranks layouts but is
not a latency. Conversion includes tracing, converting and writing. Seconds are CPU time of the process, which depends
little on other load. Memory is the peak of the whole process up to that point.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import where
from PIL import Image

PRECISIONS = ("fp32", "fp16", "w8")
CASES = {"T": "tiny_224", "S": "small_224", "B": "base_224", "odd": "tiny_odd_200x232"}
VALIDATION = 1000


def converted(case: dict[str, Any], plan: Any, folder: Path) -> tuple[Any, float]:
    """Export a golden case; return the artifact and the seconds."""
    from evm_deploy import load_checkpoint
    from evm_deploy._util.kept import KeptResults
    from evm_deploy._util.progress import silent
    from evm_deploy.export.coreml import coremltools_patch
    from evm_deploy.export.coreml import program as mlprogram
    from evm_deploy.export.coreml import target as coreml
    from evm_deploy.export.hub.graph import with_pre_and_postprocessing
    from evm_deploy.export.pipeline import complete
    from evm_deploy.export.quantization import quantize
    from evm_deploy.export.target import check_plan

    torch.save({key: torch.from_numpy(value) for key, value in case["state"].items()}, folder / "seeded.pt")
    network = load_checkpoint(folder / "seeded.pt")
    plan, preprocessing = complete(check_plan(coreml.TARGET, plan), network.spec)
    module = with_pre_and_postprocessing(network, plan, preprocessing)
    coremltools_patch.converter()  # import coremltools before the clock starts
    start = time.process_time()
    program = mlprogram.trace(module, plan, {})
    program, _ = quantize(program, plan, network.spec, preprocessing, coreml.TARGET, KeptResults(), silent)
    return coreml.build(program, plan, folder), time.process_time() - start


def seeded(variant: str) -> None:
    """Print the figures of each precision of one variant, with the golden weights and images."""
    import golden

    from evm_deploy._util.files import artifact_bytes
    from evm_deploy.export import ExportPlan
    from evm_deploy.runtimes.mil import MilRuntime

    case = golden.model_case(CASES[variant])
    images, want = case["images"], case["logits"]
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as name:
            plan = ExportPlan("coreml", precision=precision, imgsz=images.shape[2:], input="tensor")
            artifact, seconds = converted(case, plan, Path(name))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            with MilRuntime(artifact.path) as runtime:
                runtime.run({"input_tensor": images[:1]})
                start = time.process_time()
                have = np.concatenate([runtime.run({"input_tensor": image[None]})["logits"] for image in images])
                a_image = (time.process_time() - start) / len(images)
            error = float(np.linalg.norm(have - want) / np.linalg.norm(want))
            print(
                f"{variant} {precision}: relative error {error:.1e}, max|d| {np.abs(have - want).max():.1e} on "
                f"{len(images)} images, {1e3 * a_image:.0f} ms each, {artifact_bytes(artifact.path) / 1e6:.1f} MB, "
                f"converted in {seconds:.1f} s, peak {peak:.0f} MB"
            )
            print(f"   static cost {artifact.details['static_cost']}")


def sizes(sides: list[int]) -> None:
    """Print the sizes of packages of T in float16: one package for several image sizes, and one for each size."""
    import golden

    from evm_deploy._util.files import artifact_bytes
    from evm_deploy.export import ExportPlan

    first, *more = [(side, side) for side in sides]
    plans = {str(side): ExportPlan("coreml", imgsz=(side, side), min_target="iOS18") for side in sides}
    plans["all"] = ExportPlan("coreml", imgsz=first, more_imgsz=tuple(more), min_target="iOS18")
    found = {}
    for name, plan in plans.items():
        with tempfile.TemporaryDirectory() as folder:
            artifact, seconds = converted(golden.model_case(CASES["T"]), plan, Path(folder))
            found[name] = artifact_bytes(artifact.path)
            print(f"T fp16 {name}: {found[name] / 1e6:.2f} MB, converted in {seconds:.1f} s")
    largest = max(size for name, size in found.items() if name != "all")
    print(f"all in one package: {found['all'] / largest:.3f} of the largest alone")


def trained(checkpoint: Path) -> None:
    """Print the top-1 accuracy of the trained T in each precision."""
    from evm_deploy.export import ExportPlan, export

    sys.path.insert(0, str(checkpoint))
    from glyphs import glyphs

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "calib.npz", images=glyphs(256, 5000, 64)[0])
        for i, (image, label) in enumerate(zip(*glyphs(VALIDATION, 7, 64), strict=True)):
            path = folder / "val" / str(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        sizes = {}
        for precision in ("fp16", "w8", "int8"):
            plan = ExportPlan(
                "coreml",
                precision=precision,
                imgsz=(64, 64),
                crop_pct=1.0,
                calib=str(folder / "calib.npz") if precision == "int8" else None,
                val=str(folder / "val") if precision != "fp16" else None,
            )
            bundle = export(checkpoint / "evm_tiny_glyphs64.ckpt", plan, folder / "out")
            sizes[precision] = bundle.size_bytes
            facts = bundle.manifest.accuracy
            judged = (
                f"top-1 {100 * facts['top1']:.2f} % (float {100 * facts['top1_float']:.2f} %), "
                f"same class {100 * facts['agreement']:.2f} %, SQNR {facts['sqnr_db']:.1f} dB"
                if facts
                else f"max|d| {bundle.manifest.parity['max_abs']:.1e}"
            )
            print(f"{precision}: {judged}, {sizes[precision] / sizes['fp16']:.2f} of the size of float16")


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=CASES, default="T")
    parser.add_argument("--sizes", metavar="N,N..")
    parser.add_argument("--trained", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(where())
    if args.trained:
        trained(args.trained)
    elif args.sizes:
        sizes([int(side) for side in args.sizes.split(",")])
    else:
        seeded(args.variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
