"""Float network of a checkpoint in torch: what exports are compared with, and a candidate of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evm_deploy import __version__
from evm_deploy._util.packages import package_versions
from evm_deploy.bench.measurable import TORCH
from evm_deploy.calib.evaluate import compare_images, float_rows
from evm_deploy.data.boxes import DEFAULT_SELECTION
from evm_deploy.data.images import ImageSet, decoded_images
from evm_deploy.data.sources import ImageItem
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import PREPROCESSING, SELECTION, ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.export.targets import get_target
from evm_deploy.sweep.keys import digest
from evm_deploy.sweep.shards import LabelledItems, ShardRows, labelled_items, require_same
from evm_deploy.tasks import get_task
from evm_deploy.tasks.task import Outputs, Reading

CHUNK = 16  # images per inference
LIKE = "onnx"  # target whose selection of detections the network has, unless another one differs
DECIDING = ("imgsz", "input", "head", "multi_label", "weights", "drop", "labels", *PREPROCESSING, *SELECTION)


@dataclass(frozen=True)
class FloatCheckpoint:
    """Float network of a checkpoint, as a subject of evaluations and measurements, like an export.

    sha256: of the file when the work was planned. plan: settings that decide the outputs, all others at their default.
    """

    checkpoint: str
    sha256: str
    plan: ExportPlan

    made_by = ()
    own_labels = False

    @classmethod
    def of(cls, checkpoint: str, sha256: str, plan: ExportPlan) -> FloatCheckpoint:
        """Return the float network that an export with this plan is compared with; the same for most plans."""
        target = plan.target if get_target(plan.target).nms[0] != get_target(LIKE).nms[0] else LIKE
        return cls(checkpoint, sha256, ExportPlan(target, "fp32", **{name: getattr(plan, name) for name in DECIDING}))

    @cached_property
    def key(self) -> str:
        """Digest of the checkpoint's content and name, the plan and the version of torch."""
        versions = {**package_versions([TORCH]), "evm_deploy": __version__}
        return digest([TORCH, self.sha256, Path(self.checkpoint).stem, self.plan.as_dict(), versions])

    @property
    def title(self) -> str:
        """Checkpoint, torch, precision and size."""
        size = f" {self.plan.sizes}" if self.plan.imgsz else ""
        return f"{Path(self.checkpoint).stem} {TORCH} fp32{size}"

    def path(self, folder: object) -> Path:
        """Return the path of the checkpoint. Raises CheckpointError if it has changed since the work was planned."""
        require_same(self.checkpoint, self.sha256)
        return Path(self.checkpoint)

    def task(self, folder: object) -> tuple[str, None]:
        """Return the name of the network's task, and no limit of accuracy. Raises CheckpointError."""
        return self._source.network(self.plan).spec.task, None

    def accuracy(self, folder: object) -> None:
        """Return None: a checkpoint does not say its accuracy."""

    def labelled(self, folder: object, val: str) -> LabelledItems:
        """List the images of `val` with the answers that the network should give. Raises EvmError."""
        spec = self._source.network(self.plan).spec
        plan, _ = complete(self.plan, spec)
        return labelled_items(spec.name, spec.task, plan.labels, spec.num_classes or 0, val)

    @property
    def _source(self) -> Source:
        return source_of(self.checkpoint, self.sha256)

    def evaluated(self, items: tuple[ImageItem, ...]) -> tuple[ShardRows, ShardRows]:
        """Run the network on these images. Returns its outputs by name, (images, ...), and their rows.

        The rows are those of a comparison of the network with itself. Raises EvmError.
        """
        spec = self._source.network(self.plan).spec
        plan, preprocessing = complete(self.plan, spec)
        images = decoded_images(items, preprocessing)
        digest = images.digest()
        if not len(images):
            return (ShardRows({}, images.skipped, digest),) * 2
        outputs = _outputs(self._source.reference(plan, preprocessing), plan.input, images)
        selection, labels = plan.selection or DEFAULT_SELECTION, images.labels
        reading = Reading(plan.labels, places=images.places, selection=selection, classes=spec.num_classes or 0)
        task = get_task(spec.task)
        rows = {
            **compare_images(outputs, outputs, task, labels, reading),
            **float_rows(outputs, task, labels, reading),
        }
        return ShardRows(outputs, images.skipped, digest), ShardRows(rows, images.skipped, digest)


@lru_cache(maxsize=1)
def source_of(checkpoint: str, sha256: str) -> Source:
    """Return the network of a checkpoint; the last one, with its traces, stays in memory. Raises CheckpointError."""
    require_same(checkpoint, sha256)
    return Source(checkpoint)


def _outputs(module: Any, kind: str, images: ImageSet) -> Outputs:
    """Run a float network on every image, with one thread. Returns its outputs, (images, ...)."""
    import torch

    threads, parts = torch.get_num_threads(), []
    pixels = images.pixels()
    torch.set_num_threads(1)
    try:
        while chunk := list(islice(pixels, CHUNK)):
            feed = np.stack(chunk)
            values = feed if kind == "image" else images.preprocessing.normalise(feed)
            with torch.inference_mode():
                parts.append([value.numpy() for value in module(torch.from_numpy(values))])
    finally:
        torch.set_num_threads(threads)
    return {name: np.concatenate(values) for name, values in zip(module.outputs, zip(*parts, strict=True), strict=True)}
