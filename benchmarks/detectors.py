"""Measure detectors and segmenters: AP and mIoU of each form, latency of int8, and where the time goes.

    python benchmarks/detectors.py FOLDER [--images 500] [--only detector|segmenter|seeded]

Needs ../shared/trained and ../shared/golden. FOLDER keeps images, bundles and records: a second run goes on with them.

detector, segmenter: the trained networks of ../shared/trained/detseg, on generated scenes of 128x128 that they were not
trained on. int8 is calibrated on 512 other scenes. seeded: a RetinaNet-T with the shapes of a real one (256 channels,
80 classes) and random weights, at 320x320, one thread: latency, and from the runtime's own profile the share of each
part.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import where

from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.run import bench
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.demo.scenes import HELD_OUT, SIZE, write_scenes
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.source import Source
from evm_deploy.report.collect import collect
from evm_deploy.sweep.forms import Form
from evm_deploy.sweep.matrix import Matrix, run_matrix
from evm_deploy.tasks.detection import DETECTION
from evm_deploy.tasks.segmentation import SEGMENTATION

SHARED = Path(__file__).resolve().parents[2] / "shared"
TRAINED = SHARED / "trained" / "detseg"
FORMS = (("torch", "fp32"), ("onnx", "fp32"), ("openvino", "fp32"), ("onnx", "int8"), ("openvino", "int8"))
CHECKPOINTS = {"detector": "retinanet_scenes128.pth", "segmenter": "upernet_scenes128.pth"}
CALIBRATION_SEED = 5000
SEEDED_SIZE, SEEDED_CALIBRATION = 320, 32
GOLDEN = "retina_tiny_odd_200x232"
PARTS = ("backbone", "neck", "bbox_head.cls_convs", "bbox_head.reg_convs", "bbox_head.retina", "selection")


def scenes(folder: Path, count: int, seed: int, size: int = SIZE) -> Path:
    """Write labelled scenes. Returns their folder."""
    write_scenes(folder, count, seed, size)
    return folder


def trained(folder: Path, count: int, name: str) -> None:
    """Print the scores and the latency of a trained network in every form. name: key of CHECKPOINTS."""
    val = scenes(folder / "val", count, HELD_OUT)
    matrix = Matrix(
        TRAINED / CHECKPOINTS[name],
        tuple(Form(*form) for form in FORMS),
        (Settings(threads=1, batch=1),),
        folder / name,
        imgsz=str(SIZE),
        calib=str(scenes(folder / "calib", 512, CALIBRATION_SEED) / "images"),
        val=str(val / "instances.json" if name == "detector" else val),
    )
    outcome = run_matrix(matrix)
    score = (DETECTION if name == "detector" else SEGMENTATION).score
    scores = list(score.titles if score else ())
    heads = [*scores, "p50 ms", "faster", "SQNR dB"]
    print(f"{f'trained {name}, {SIZE}x{SIZE}':<28}" + "".join(f"{head:>15}" for head in heads))
    for path in outcome.records:
        record = Record.read(path)
        facts = record.bundle["accuracy"] or {}
        form = f"{record.bundle['target']} {record.bundle['precision']}"
        figures = [*(f"{100 * facts[score]:.2f}" for score in scores), f"{record.summary_ms['p50']:.2f}"]
        if record.bundle["precision"] == "int8":
            figures += [f"{gain(bundle_of(matrix.out, record)):.2f}x", f"{facts['sqnr_db']:.1f}"]
        print(f"{form:<28}" + "".join(f"{figure:>15}" for figure in figures))
    for form, error in outcome.failed.items():
        print(f"{form}: {error}")


def bundle_of(folder: Path, record: Record) -> Path:
    """Return the bundle in the folder of a comparison that a record is of."""
    bundles = collect([folder]).bundles
    return bundles[record.bundle["manifest_sha256"]].path


def gain(bundle: Path) -> float:
    """Return how many times as fast as float32 a bundle is, both in turn, as its export measured it."""
    found: float = open_bundle(bundle).manifest.details["quantization"]["speed_over_fp32_here"]
    return found


def seeded(folder: Path) -> None:
    """Print latency and shares of a RetinaNet-T of random weights in float32 and int8."""
    sys.path.insert(0, str(SHARED / "golden" / "detseg"))
    import detseg
    import torch

    checkpoint = folder / "retinanet_t.pth"
    if not checkpoint.exists():
        state = {key: torch.from_numpy(value) for key, value in detseg.case(GOLDEN).state.items()}
        torch.save({"meta": {}, "state_dict": state}, checkpoint)
    images = scenes(folder / "calib320", SEEDED_CALIBRATION, CALIBRATION_SEED, SEEDED_SIZE) / "images"
    source, size = Source(checkpoint), (SEEDED_SIZE, SEEDED_SIZE)
    print(f"RetinaNet-T, {SEEDED_SIZE}x{SEEDED_SIZE}, 80 classes, 1 thread; ms, and share of each part in the profile")
    for target in ("onnx", "openvino"):
        for precision in ("fp32", "int8"):
            how = {"calib": str(images), "force_calib": True, "smooth": "off"} if precision == "int8" else {}
            bundle = export(source, ExportPlan(target, precision, imgsz=size, **how), folder / "dist", force=True)
            record = bench(bundle.path, Settings(threads=1))
            faster = f"   {gain(bundle.path):.2f}x as fast as float32, in turn" if precision == "int8" else ""
            print(f"{target} {precision:<6} p50 {record.summary_ms['p50']:7.1f} ms{faster}")
            print("    " + ", ".join(f"{name} {share:.1%}" for name, share in shares(record.layers)))


def shares(layers: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the parts of a detector with their share in the time of all nodes, of `Record.layers`."""
    sums: dict[str, float] = defaultdict(float)
    for each in layers["modules"]:
        sums[next((part for part in PARTS if each["module"].startswith(part)), "other")] += each["ms"]
    total = sum(sums.values())
    yield from ((name, ms / total) for name, ms in sums.items())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Scores and latency of detectors and segmenters.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--only", choices=(*CHECKPOINTS, "seeded"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(where())
    for name in CHECKPOINTS:
        if args.only in (None, name):
            trained(args.folder, args.images, name)
    if args.only in (None, "seeded"):
        seeded(args.folder)


if __name__ == "__main__":
    main()
