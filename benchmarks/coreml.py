"""Core ML packages as they can be judged without a Mac: error against the float model, size, static cost, conversion.

    python benchmarks/coreml.py --variant T --imgsz 224        float32, float16 and w8 of seeded weights
    python benchmarks/coreml.py --trained ../shared/trained     top-1 of the trained T: float16, w8, int8

Computed in the MIL runtime. Static cost is counted, not timed: it ranks layouts and is no latency. Conversion: tracing,
converting and writing, one thread; the memory is that of the whole process up to then.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import where
from PIL import Image

PRECISIONS = ("fp32", "fp16", "w8")
CASES = {"T": "tiny_224", "S": "small_224", "B": "base_224"}
VALIDATION = 1000


def seeded(variant: str, imgsz: int) -> None:
    """Each precision of one variant with the golden weights."""
    import golden

    from evm_deploy import ExportPlan, load_checkpoint
    from evm_deploy.export import coreml, mlprogram
    from evm_deploy.export.graph import deployable
    from evm_deploy.export.pipeline import complete
    from evm_deploy.export.quantization import quantize
    from evm_deploy.export.selftest import probe_inputs
    from evm_deploy.export.target import check_plan
    from evm_deploy.files import artifact_bytes
    from evm_deploy.progress import silent
    from evm_deploy.runtimes.mil import MilRuntime

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = golden.model_case(CASES[variant])["state"]
        torch.save({key: torch.from_numpy(value) for key, value in state.items()}, folder / "seeded.pt")
        for precision in PRECISIONS:
            plan = ExportPlan("coreml", precision=precision, imgsz=(imgsz, imgsz))
            model, spec = load_checkpoint(folder / "seeded.pt")
            plan, preprocessing = complete(check_plan(coreml.TARGET, plan), spec)
            module = deployable(model, plan, preprocessing)
            coreml.mlprogram.converter()  # imported before the clock starts
            start = time.perf_counter()
            program = mlprogram.trace(module, plan, {})
            program, _ = quantize(program, plan, spec, preprocessing, coreml.TARGET, silent)
            (folder / precision).mkdir()
            artifact = coreml.build(program, plan, folder / precision)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            probes = probe_inputs(plan, preprocessing)
            with torch.inference_mode(), MilRuntime(artifact.path) as runtime:
                want = module(torch.from_numpy(probes)).numpy()
                have = np.concatenate([runtime.run({"image": probe[None]})["logits"] for probe in probes])
            size = artifact_bytes(artifact.path)
            error = float(np.linalg.norm(have - want) / np.linalg.norm(want))
            print(
                f"{variant} {imgsz} {precision}: relative error {error:.1e}, max|d| {np.abs(have - want).max():.1e}, "
                f"{size / 1e6:.1f} MB, converted in {seconds:.1f} s, peak {peak:.0f} MB"
            )
            print(f"   static cost {artifact.details['static_cost']}")


def trained(checkpoint: Path) -> None:
    """Top-1 of the trained T in each precision."""
    from evm_deploy import ExportPlan, export

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=CASES, default="T")
    parser.add_argument("--imgsz", type=int, default=224)
    parser.add_argument("--trained", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(where())
    if args.trained:
        trained(args.trained)
    else:
        seeded(args.variant, args.imgsz)
    return 0


if __name__ == "__main__":
    sys.exit(main())
