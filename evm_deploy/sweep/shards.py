"""Evaluation in shards: each is computed alone, on any machine, and their rows add up to the same digits in any order.

A shard depends on its images and its networks alone. Networks run with one thread per inference, because the sums of
several threads may round differently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import sha256
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import LoadedBundle, load
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.calib.candidate import feeds
from evm_deploy.calib.evaluate import Accuracy, compare_images, float_rows, own_rows
from evm_deploy.calib.evaluation import SHARD, stacked
from evm_deploy.data.images import ImageSet, decoded_images, require_readable
from evm_deploy.data.sources import ImageItem
from evm_deploy.demo import images_path
from evm_deploy.errors import CheckpointError, UsageError
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes.registry import runtime_of
from evm_deploy.tasks import get_task
from evm_deploy.tasks.task import Outputs, Reading, Rows, Task

CHUNK = 16  # images per inference of a float network in torch


@dataclass(frozen=True)
class FloatCheckpoint:
    """Float network that a bundle is compared with: the checkpoint and plan of its export.

    sha256: of the checkpoint's file when the work was planned.
    """

    path: str
    sha256: str
    plan: ExportPlan


@dataclass(frozen=True)
class Shard:
    """Images of an evaluation that are computed together. items: not decoded yet, each with its true answer.

    bundle: path. reference: what the bundle is compared with: another bundle, a checkpoint in torch, or nothing.
    """

    bundle: str
    reference: str | FloatCheckpoint | None
    items: tuple[ImageItem, ...]


@dataclass(frozen=True)
class ShardRows:
    """Result of a shard: rows (`calib.evaluate.compare_images`), and what ImageSet says on its images."""

    rows: Rows
    skipped: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class LabelledItems:
    """Images of an evaluation, not decoded, and a sentence on the order of their classes."""

    items: Sequence[ImageItem]
    order: str

    def shards(self, bundle: str, reference: str | FloatCheckpoint | None) -> list[Shard]:
        """Return the shards of these images for a bundle, SHARD images each."""
        starts = range(0, len(self.items), SHARD)
        return [Shard(bundle, reference, tuple(self.items[at : at + SHARD])) for at in starts]


def labelled_items(bundle: Path, val: str) -> LabelledItems:
    """List the images of `val` with the answers that a bundle's network should give. No image is decoded.

    Raises UsageError for a bundle whose task has no labels, CalibrationError for images that do not fit the network.
    """
    manifest = open_bundle(bundle).manifest
    score = get_task(manifest.task).score
    if not score:
        raise UsageError(f"{bundle} gives {manifest.task}, which has no labels", "evaluate a bundle with answers")
    source = images_path(val, "heldout", manifest.task)
    items, order = score.read(source, _labels(bundle, manifest), _classes(manifest))
    return LabelledItems(items, order)


def evaluated(shard: Shard, cores: int) -> ShardRows:
    """Evaluate the images of a shard, with `cores` inferences at a time.

    Images that cannot be read are in the result. Raises EvmError.
    """
    manifest = Manifest.read(Path(shard.bundle))
    with _opened(shard.bundle, cores) as (model, streams):
        images = decoded_images(shard.items, model.preprocessing)
        if not len(images):
            return ShardRows({}, images.skipped, images.digest())
        reading = Reading(model.labels, places=images.places, selection=manifest.selection, classes=_classes(manifest))
        outputs = _outputs(model, images, streams)
        with _reference(shard.reference, model, cores) as run:
            expected = run(images) if run else None
        rows = _rows(expected, outputs, model.task, images, reading)
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


@contextlib.contextmanager
def _reference(
    given: str | FloatCheckpoint | None, model: LoadedBundle, cores: int
) -> Iterator[Callable[[ImageSet], Outputs] | None]:
    """Context manager: open what a bundle is compared with. Yields a function from images to outputs, or None."""
    if given is None:
        yield None
    elif isinstance(given, str):
        with _opened(given, cores) as (other, streams):
            if _interface(other) != _interface(model):
                raise UsageError(
                    f"{given} and {model.bundle.path} cannot be compared: task, outputs or preprocessing differ",
                    "compare with an export of the same network for the same size",
                )
            yield lambda images: _outputs(other, images, streams)
    else:
        yield lambda images: _in_torch(given, images)


def _interface(model: LoadedBundle) -> tuple[Any, ...]:
    """Return what two bundles share whose outputs can be compared."""
    outputs = {name: spec.shape[1:] for name, spec in model.outputs.items()}
    return model.task.name, model.preprocessing, model.labels, outputs


def _in_torch(given: FloatCheckpoint, images: ImageSet) -> Outputs:
    """Run the float network of a checkpoint on every image. Returns its outputs, (images, ...)."""
    import torch

    module, kind = _float_network(given)
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


@lru_cache(maxsize=1)
def _float_network(given: FloatCheckpoint) -> tuple[Any, str]:
    """Return the float network of a checkpoint and the kind of its input; the last one stays loaded."""
    from evm_deploy.export.pipeline import complete
    from evm_deploy.export.source import Source

    require_same(given.path, given.sha256)
    source = Source(given.path)
    plan, preprocessing = complete(given.plan, source.network(given.plan).spec)
    return source.reference(plan, preprocessing), plan.input


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
