"""Measure detectors: AP of float, ONNX and OpenVINO in float32 and int8, latency of int8, and where the time goes.

    python benchmarks/detectors.py FOLDER [--images 500] [--only trained|seeded]

Needs ../shared/trained and ../shared/golden. FOLDER keeps images, bundles and records: a second run goes on with them.

trained: the RetinaNet of ../shared/trained/detseg, on generated scenes of 128x128 that it was not trained on, as a COCO
file. int8 is calibrated on 512 other scenes. seeded: a RetinaNet-T with the shapes of a real one (256 channels, 80
classes) and random weights, at 320x320, one thread: latency, and from the runtime's own profile the share of each part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import where
from PIL import Image

from evm_deploy.bench.matrix import Form, Matrix, run_matrix
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.run import bench
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.source import Source
from evm_deploy.tasks import TITLES

SHARED = Path(__file__).resolve().parents[2] / "shared"
TRAINED = SHARED / "trained" / "detseg"
FORMS = (("torch", "fp32"), ("onnx", "fp32"), ("openvino", "fp32"), ("onnx", "int8"), ("openvino", "int8"))
CALIBRATION_SEED, VALIDATION_SEED = 5000, 901
SEEDED_SIZE, SEEDED_CALIBRATION = 320, 32
GOLDEN = "retina_tiny_odd_200x232"
PARTS = ("backbone", "neck", "bbox_head.cls_convs", "bbox_head.reg_convs", "bbox_head.retina", "selection")


def scene(seed: int, index: int, size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return a generated scene: `image` (H, W, 3) uint8, `boxes` (n, 4), `labels` (n,)."""
    sys.path.insert(0, str(TRAINED))
    import scenes

    found: dict[str, np.ndarray[Any, Any]] = scenes.scene(seed, index, size)
    return found


def calibration(folder: Path, count: int, size: int) -> Path:
    """Write scenes to calibrate with as images. Returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        if not (folder / f"{index:04}.png").exists():
            Image.fromarray(scene(CALIBRATION_SEED, index, size)["image"]).save(folder / f"{index:04}.png")
    return folder


def labelled(folder: Path, count: int, size: int, classes: list[str]) -> Path:
    """Write held-out scenes as images and a COCO JSON file. Returns the file."""
    (folder / "val").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        found, name = scene(VALIDATION_SEED, index, size), f"{index:04}.png"
        Image.fromarray(found["image"]).save(folder / "val" / name)
        images.append({"id": index, "file_name": name})
        for (x1, y1, x2, y2), label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": label + 1, "image_id": index, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **box})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    path = folder / "val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def trained(folder: Path, count: int) -> None:
    """Print AP, latency and sensitivity of the trained RetinaNet in every form."""
    checkpoint = TRAINED / "retinanet_scenes128.pth"
    classes = list(Source(checkpoint).network(ExportPlan("onnx")).spec.defaults["labels"])
    matrix = Matrix(
        checkpoint,
        tuple(Form(*form) for form in FORMS),
        (Settings(threads=1, batch=1),),
        folder / "records",
        imgsz="128",
        calib=str(calibration(folder / "calib", 512, 128)),
        val=str(labelled(folder, count, 128, classes)),
    )
    outcome = run_matrix(matrix)
    heads = [*shown(), "p50 ms", "faster", "SQNR dB"]
    print(f"{'trained RetinaNet, 128x128':<28}" + "".join(f"{head:>9}" for head in heads))
    for path in outcome.records:
        record = Record.read(path)
        facts = record.bundle["accuracy"] or {}
        form = f"{record.bundle['target']} {record.bundle['precision']}"
        figures = [*(f"{100 * facts[name]:.2f}" for name in shown()), f"{record.summary_ms['p50']:.2f}"]
        if record.bundle["precision"] == "int8":
            figures += [f"{gain(matrix.out / 'bundles' / record.bundle['name']):.2f}x", f"{facts['sqnr_db']:.1f}"]
        print(f"{form:<28}" + "".join(f"{figure:>9}" for figure in figures))
    for form, error in outcome.failed.items():
        print(f"{form}: {error}")


def gain(bundle: Path) -> float:
    """Return how many times as fast as float32 a bundle is, both in turn, as its export measured it."""
    found: float = open_bundle(bundle).manifest.details["quantization"]["speed_over_fp32_here"]
    return found


def shown() -> list[str]:
    """Return the names of a detector's figures."""
    return [name for name in TITLES if name.startswith("AP")]


def seeded(folder: Path) -> None:
    """Print latency and shares of a RetinaNet-T of random weights in float32 and int8."""
    sys.path.insert(0, str(SHARED / "golden" / "detseg"))
    import detseg
    import torch

    checkpoint = folder / "retinanet_t.pth"
    if not checkpoint.exists():
        state = {key: torch.from_numpy(value) for key, value in detseg.case(GOLDEN).state.items()}
        torch.save({"meta": {}, "state_dict": state}, checkpoint)
    images = calibration(folder / "calib320", SEEDED_CALIBRATION, SEEDED_SIZE)
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
    parser = argparse.ArgumentParser(description="AP and latency of detectors in float32 and int8.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--only", choices=("trained", "seeded"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(where())
    if args.only != "seeded":
        trained(args.folder, args.images)
    if args.only != "trained":
        seeded(args.folder)


if __name__ == "__main__":
    main()
