"""Accuracy of the trained T in int8 by calibration method, and in w8: 512 generated images to calibrate, 2000 to judge.

    python benchmarks/int8_methods.py

Needs ../shared/trained. Prints top-1, the points lost against float, agreement, SQNR and share of float32's size.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import where
from PIL import Image

from evm_deploy import EvmError, ExportPlan, export
from evm_deploy.calib.histogram import METHODS
from evm_deploy.export.manifest import Manifest

TRAINED = Path(__file__).resolve().parents[2] / "shared" / "trained"
CALIBRATION_SEED, VALIDATION_SEED = 5000, 7


def main() -> int:
    if not TRAINED.is_dir():
        print(f"{TRAINED} is not there", file=sys.stderr)
        return 2
    sys.path.insert(0, str(TRAINED))
    from glyphs import glyphs

    print(where())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "calib.npz", images=glyphs(512, CALIBRATION_SEED, 64)[0])
        for i, (image, label) in enumerate(zip(*glyphs(2000, VALIDATION_SEED, 64), strict=True)):
            path = folder / "val" / str(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        val = str(folder / "val")
        w8 = ExportPlan("onnx", precision="w8", imgsz=(64, 64), crop_pct=1.0, val=val, max_drop=100.0)
        int8 = replace(w8, precision="int8", calib=str(folder / "calib.npz"))
        plans = {method: replace(int8, calib_method=method) for method in (*METHODS, "auto")} | {"w8": w8}
        for method, plan in plans.items():
            try:
                manifest = export(TRAINED / "evm_tiny_glyphs64.ckpt", plan, folder / "out", force=True).manifest
                note = ""
            except EvmError as error:
                manifest = Manifest.read(next((folder / "out").glob("*.rejected")))
                note = f"   rejected: {str(error).splitlines()[0]}"
            a, size = manifest.accuracy or {}, manifest.details["quantization"]["size_of_fp32"]
            print(
                f"{method:<11} top-1 {100 * a['top1']:.2f} % (float {100 * a['top1_float']:.2f} %, {-a['drop']:+.2f})"
                f"   same class {100 * a['agreement']:.2f} %   SQNR {a['sqnr_db']:.1f} dB   size {size:.3f}{note}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
