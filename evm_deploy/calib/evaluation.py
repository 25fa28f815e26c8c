"""Evaluate quantised networks on images, in shards whose results are kept, so that an interruption loses little."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.calib.candidate import QuantizationCandidate, feeds
from evm_deploy.calib.config import QuantizationConfig
from evm_deploy.calib.evaluate import Accuracy, compare_images, float_rows
from evm_deploy.data.images import ImageSet, sample
from evm_deploy.runtimes.base import Runtime
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.tasks.task import Labels, Outputs, Reading, Rows

if TYPE_CHECKING:
    import onnx

Run = Callable[[ImageSet], Generator[Outputs, None, None]]  # yields each image's outputs, in their first row
OpenCandidate = Callable[[Any], AbstractContextManager[Runtime]]

COMPARED = 2000  # evaluation images that candidates are compared on; the chosen one is evaluated on all
SHARD = 512  # images whose results are computed and kept together


class Evaluation:
    """Accuracy of candidates on images, each measured on the artifact as exported, against the float network.

    images: in shards of SHARD; results of a shard depend on nothing but the network and the shard's images. The float
    network's outputs and each candidate's rows (`evaluate.Rows`) are kept in `config.kept`, and not computed again.
    float_outputs: runs the float network. `open_candidate(graph)`: opens a graph as the target will run it. taken:
    number of rows that an interrupted run has left.
    """

    def __init__(
        self, images: ImageSet, float_outputs: Run, config: QuantizationConfig, open_candidate: OpenCandidate
    ) -> None:
        self.images, self.config = images, config
        self.shards = [
            replace(images, items=images.items[start : start + SHARD]) for start in range(0, len(images), SHARD)
        ]
        self.taken = 0
        self._float_outputs, self._open_candidate = float_outputs, open_candidate

    def __call__(self, source: QuantizationCandidate, blocks: Collection[str]) -> Accuracy:
        """Return the accuracy of `source` with these blocks quantised."""

        def run(images: ImageSet) -> Generator[Outputs, None, None]:
            with self._open_candidate(source.quantized(blocks)) as runtime:
                yield from run_each(runtime, images, self.config)

        rows = self._rows(f"rows of {source.identity(blocks)}, labelled: {bool(self.config.val)}", run)
        return Accuracy.of(rows, self.config.task, self.config.max_drop)

    def without(self, source: QuantizationCandidate, kept: Collection[str]) -> Accuracy:
        """Return the accuracy of `source` with all blocks quantised except `kept`."""
        return self(source, set(source.blocks) - set(kept))

    def _rows(self, name: str, run: Run) -> list[Rows]:
        """Return the rows of every shard, in order. name: identity of the network that `run` runs."""
        kept = self.config.kept
        names = [f"{name}, images {shard.digest()}" for shard in self.shards]
        found = [kept.get(each) for each in names]
        self.taken += sum(len(shard) for each, shard in zip(names, self.shards, strict=True) if kept.inherited(each))
        missing = [i for i, rows in enumerate(found) if rows is None]
        expected = self._expected(missing)
        for i, outputs in self._in_shards(run, missing):
            labels, reading = self._labelled(i)
            found[i] = rows = compare_images(expected(i), outputs, self.config.task, labels, reading)
            kept.put(names[i], rows)
        return [{**rows, **self._float_rows(i, expected)} for i, rows in enumerate(found) if rows is not None]

    def _float_rows(self, i: int, expected: Callable[[int], Outputs]) -> Rows:
        """Return the rows of a shard that depend on the float network alone."""
        labels, reading = self._labelled(i)
        if labels is None:
            return {}
        name = f"float rows, images {self.shards[i].digest()}"
        rows = self.config.kept.get(name)
        if rows is None:
            rows = float_rows(expected(i), self.config.task, labels, reading)
            self.config.kept.put(name, rows)
        return rows

    def _labelled(self, i: int) -> tuple[Labels | None, Reading]:
        """Return the true answers of a shard's images, None without --val, and how outputs are read to compare them."""
        if not self.config.val:
            return None, self.config.reading
        shard = self.shards[i]
        return shard.labels, replace(self.config.reading, places=shard.places)

    def _expected(self, wanted: Sequence[int]) -> Callable[[int], Outputs]:
        """Run the float network on the shards of these numbers. Returns a function: number -> outputs of the shard."""
        kept = self.config.kept
        names = [f"float, images {shard.digest()}" for shard in self.shards]
        missing = [i for i in wanted if kept.get(names[i]) is None]
        for i, outputs in self._in_shards(self._float_outputs, missing):
            kept.put(names[i], outputs)

        def expected(i: int) -> Outputs:
            return kept.get(names[i]) or next(outputs for _, outputs in self._in_shards(self._float_outputs, [i]))

        return expected

    def _in_shards(self, run: Run, wanted: Sequence[int]) -> Iterator[tuple[int, Outputs]]:
        """Run a network on the shards of these numbers. Yields each number with the shard's outputs, (images, ...)."""
        if not wanted:
            return
        items = tuple(item for i in wanted for item in self.shards[i].items)
        before, total, progress = len(self.images) - len(items), len(self.images), self.images.progress
        images = replace(self.images, items=items, progress=lambda done, _: progress(before + done, total))
        with contextlib.closing(run(images)) as stream:
            for i in wanted:
                yield i, stacked(islice(stream, len(self.shards[i])))


def evaluation_stages(evaluated: ImageSet) -> list[ImageSet]:
    """Return the images to compare candidates on, and all images if these are more."""
    part = replace(evaluated, items=tuple(sample(evaluated.items, COMPARED)))
    return [part, evaluated] if len(part) < len(evaluated) else [evaluated]


def run_each(runtime: Runtime, images: ImageSet, config: QuantizationConfig) -> Generator[Outputs, None, None]:
    """Run a model on every image. Yields its outputs, those of the image in the first row."""
    (name,) = runtime.inputs
    for feed in feeds(images, config.input, runtime):
        yield runtime.run({name: feed})


def stacked(runs: Iterable[Outputs]) -> Outputs:
    """Stack the first row of each run. Returns the outputs by name: (runs, ...)."""
    rows: dict[str, list[NDArray[Any]]] = {}
    for outputs in runs:
        for name, value in outputs.items():
            rows.setdefault(name, []).append(value[0])
    return {name: np.stack(values) for name, values in rows.items()}


def graph_outputs(
    model: onnx.ModelProto, config: QuantizationConfig, plugin: Path | None, images: ImageSet
) -> Generator[Outputs, None, None]:
    """Run a hub graph on every image, in ONNX Runtime. Yields its outputs, those of the image in the first row."""
    with OnnxRuntime(model.SerializeToString(), plugin=plugin) as runtime:
        yield from run_each(runtime, images, config)
