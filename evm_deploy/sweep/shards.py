"""Evaluation in shards: each is computed alone, on any machine, and their rows add up to the same digits in any order.

A shard depends on its images and its networks alone. Networks run with one thread per inference, because the sums of
several threads may round differently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from evm_deploy._util.files import sha256
from evm_deploy._util.text import some_of
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import LoadedBundle, load
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.calib.candidate import feeds
from evm_deploy.calib.evaluate import Accuracy, compare_images, float_rows, own_rows
from evm_deploy.calib.evaluation import SHARD, stacked
from evm_deploy.data.images import ImageSet, decoded_images, require_readable
from evm_deploy.data.sources import ImageItem
from evm_deploy.demo import images_path
from evm_deploy.errors import CalibrationError, CheckpointError, UsageError
from evm_deploy.runtimes.registry import runtime_of
from evm_deploy.tasks import get_task
from evm_deploy.tasks.task import Outputs, Reading, Rows, Task


@dataclass(frozen=True)
class Shard:
    """Images of an evaluation that are computed together. items: not decoded yet, each with its true answer.

    bundle: path. reference: path of another bundle that it is compared with, None for nothing, or for outputs of the
    float network that are known.
    """

    bundle: str
    reference: str | None
    items: tuple[ImageItem, ...]


@dataclass(frozen=True)
class ShardRows:
    """Result of a shard: rows by name, one or more for each image, and what ImageSet says on its images.

    Rows of an evaluation are those of `calib.evaluate.compare_images`, rows of the float network alone its outputs.
    """

    rows: Rows
    skipped: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class LabelledItems:
    """Images of an evaluation, not decoded, and a sentence on the order of their classes."""

    items: Sequence[ImageItem]
    order: str

    def parts(self) -> list[tuple[ImageItem, ...]]:
        """Return the images of each shard, SHARD each."""
        return [tuple(self.items[at : at + SHARD]) for at in range(0, len(self.items), SHARD)]


def labelled_items(name: str, task: str, labels: Sequence[str] | None, classes: int, val: str) -> LabelledItems:
    """List the images of `val` with the answers that a network should give. No image is decoded.

    name, task, labels, classes: of the network. Raises UsageError for a task that has no labels, CalibrationError for
    images that do not fit the network.
    """
    score = get_task(task).score
    if not score:
        raise UsageError(f"--val: {name} gives {task}, which has no labels", "evaluate a network with answers")
    items, order = score.read(images_path(val, "heldout", task).absolute(), labels, classes)
    return LabelledItems(items, order)


def labelled_for(bundle: Path, val: str) -> LabelledItems:
    """Return `labelled_items` for the network of a bundle. Raises BundleError, UsageError, CalibrationError."""
    manifest = open_bundle(bundle).manifest
    return labelled_items(str(bundle), manifest.task, _labels(bundle, manifest), _classes(manifest), val)


def evaluated(shard: Shard, cores: int, expected: ShardRows | None = None) -> ShardRows:
    """Evaluate the images of a shard, with `cores` inferences at a time.

    expected: outputs of the float network on these images, if they are known. Images that cannot be read are in the
    result. Raises EvmError, also if the images have changed since the outputs were computed.
    """
    manifest = Manifest.read(Path(shard.bundle))
    with _opened(shard.bundle, cores) as (model, streams):
        images = decoded_images(shard.items, model.preprocessing)
        if expected and expected.digest != images.digest():
            names = some_of([item.name for item in shard.items])
            raise CalibrationError(
                f"images have changed during the work: some of {names}", "run the same command again"
            )
        if not len(images):
            return ShardRows({}, images.skipped, images.digest())
        reading = Reading(model.labels, places=images.places, selection=manifest.selection, classes=_classes(manifest))
        outputs = _outputs(model, images, streams)
        if shard.reference:
            with _opened(shard.reference, cores) as (other, its_streams):
                require_comparable(model, other)
                reference: Outputs | None = _outputs(other, images, its_streams)
        else:
            reference = expected.rows if expected else None
        rows = _rows(reference, outputs, model.task, images, reading)
        return ShardRows(rows, images.skipped, images.digest())


def accuracy(parts: Sequence[ShardRows], task: Task, source: str) -> Accuracy:
    """Return the accuracy of all shards, the same for any order. Raises CalibrationError for unreadable images."""
    skipped = [text for part in parts for text in part.skipped]
    good = [part.rows for part in parts if part.rows]
    require_readable(source, skipped, sum(len(rows["image"]) for rows in good) + len(skipped))
    return Accuracy.of(good, task)


def _rows(expected: Outputs | None, outputs: Outputs, task: Task, images: ImageSet, reading: Reading) -> Rows:
    if expected is None:
        return own_rows(outputs, task, images.labels, reading)
    rows = compare_images(expected, outputs, task, images.labels, reading)
    return {**rows, **float_rows(expected, task, images.labels, reading)}


def _outputs(model: LoadedBundle, images: ImageSet, streams: int) -> Outputs:
    """Run a bundle on every image, `streams` at a time. Returns its outputs, (images, ...)."""
    (name,) = model.inputs

    def run(feed: NDArray[Any]) -> Outputs:
        return model.run({name: feed})

    every = feeds(images, model.manifest.input, model)
    with ThreadPoolExecutor(streams) as pool:
        chunks = iter(lambda: list(islice(every, 4 * streams)), [])
        return stacked(outputs for chunk in chunks for outputs in pool.map(run, chunk))


def require_comparable(model: LoadedBundle, other: LoadedBundle) -> None:
    """Raise UsageError unless the outputs of two bundles can be compared."""
    if _interface(other) != _interface(model):
        raise UsageError(
            f"{other.bundle.path} and {model.bundle.path} cannot be compared: task, outputs or preprocessing differ",
            "compare with an export of the same network for the same size",
        )


def _interface(model: LoadedBundle) -> tuple[Any, ...]:
    """Return what two bundles share whose outputs can be compared."""
    outputs = {name: spec.shape[1:] for name, spec in model.outputs.items()}
    return model.task.name, model.preprocessing, model.labels, outputs


def require_same(checkpoint: str, digest: str) -> None:
    """Raise CheckpointError unless the file of a checkpoint is the one that the work was planned for."""
    try:
        found = sha256(Path(checkpoint))
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint} cannot be read here: {error.strerror}", "put it where every worker reads it"
        ) from error
    if found != digest:
        raise CheckpointError(
            f"{checkpoint} has changed since the work was planned", "run the same command again, which plans anew"
        )


@contextlib.contextmanager
def _opened(bundle: str, cores: int) -> Iterator[tuple[LoadedBundle, int]]:
    """Context manager: open a bundle. Yields it, and the number of inferences to run at the same time.

    Runtimes that run one inference at a time choose their threads themselves.
    """
    streams = cores if runtime_of(Manifest.read(Path(bundle)).target, Path(bundle)).streams else 0
    with load(bundle, threads=1 if streams else None, streams=streams or 1) as model:
        yield model, streams or 1


def _labels(bundle: Path, manifest: Manifest) -> list[str] | None:
    file = bundle / "labels.txt"
    return file.read_text(encoding="utf-8").splitlines() if "labels.txt" in manifest.files else None


def _classes(manifest: Manifest) -> int:
    """Return the number of classes of a bundle's network; older bundles of classifiers have as many as outputs."""
    return int(manifest.model.get("num_classes") or manifest.outputs[0]["shape"][-1] or 0)
