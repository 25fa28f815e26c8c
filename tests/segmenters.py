"""Golden segmenters of mmseg as checkpoint files, and their artifacts without the verification of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from evm_deploy.data.geometry import Geometry
from evm_deploy.export.description import native_metadata
from evm_deploy.export.pipeline import built, complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.export.target import Artifact, check_plan, native_library, open_here
from evm_deploy.export.targets import get_target
from evm_deploy.runtimes.base import RunOptions
from tests.detectors import GOLDEN, detseg, save

CASES = [name for name in detseg.names() if name.startswith("upernet")]
CONFIG = (GOLDEN / "detseg" / "cfg_upernet.txt").read_text()
NAMES = ("wall", "дорога", "道路", "حديقة", "🦆", "sky", "traffic light")
PALETTE = [[40 * i, 255 - 30 * i, 90] for i in range(7)]
CLASSIFIER = "decode_head.conv_seg"


def case(name: str) -> Any:
    return detseg.case(name)


def saved(folder: Path, name: str = "upernet_micro", meta: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write the file of a golden case; changes: keys whose tensors are replaced, or left out for None."""
    state = {**{key: torch.from_numpy(np.asarray(value)) for key, value in case(name).state.items()}, **changes}
    return save(folder / f"{name}.pth", {key: value for key, value in state.items() if value is not None}, meta)


def named(folder: Path) -> Path:
    """Write the micro segmenter with class names of many scripts, and a palette."""
    return saved(folder, meta={"dataset_meta": {"classes": NAMES, "palette": PALETTE}})


def binary(folder: Path, **head: Any) -> Path:
    """Write a micro segmenter with one class. head: further settings of its head, as Python text."""
    given = case("upernet_micro")
    weight, bias = (given.state[f"{CLASSIFIER}.{kind}"][2:3] for kind in ("weight", "bias"))
    middle = given.expected["logits"][:, 2].mean()  # so that scores are on both sides of every threshold
    changed = {"weight": 8 * weight, "bias": 8 * (bias - middle)}
    one = {f"{CLASSIFIER}.{kind}": torch.from_numpy(value.astype(np.float32)) for kind, value in changed.items()}
    settings = "".join(f", {key}={value}" for key, value in head.items())
    config = f"model = dict(decode_head=dict(type='UPerHead', out_channels=1, num_classes=2{settings}))"
    return saved(folder, meta={"cfg": config, "CLASSES": ("road",)}, **one)


def artifact(folder: Path, checkpoint: Path, plan: ExportPlan) -> tuple[Artifact, ExportPlan]:
    """Build the artifact of a plan; returns it with the complete plan."""
    target, source = get_target(plan.target), Source(checkpoint)
    spec = source.network(plan).spec
    plan, preprocessing = complete(check_plan(target, plan), spec)
    traced = source.traced(target, plan, preprocessing, native_metadata(plan, spec, preprocessing))
    return built(target, traced, plan, folder), plan


def label_map(artifact: Artifact, plan: ExportPlan, images: Any) -> Any:
    """Run an artifact, natively where it can, and return its label map."""
    target = get_target(plan.target)
    plugin = None if plan.scan == "portable" else native_library(target, artifact)
    with open_here(target, artifact.path, RunOptions(plugin=plugin)) as runtime:
        (name,) = runtime.inputs
        return runtime.run({name: images})["label_map"]


def places(given: Any) -> list[Geometry]:
    """Return the place of each image of a case in its input."""
    return [
        Geometry(tuple(meta["ori_shape"]), tuple(meta["img_shape"]), tuple(given.inputs.shape[2:]), (0, 0))
        for meta in given.metas
    ]
