"""Evaluate quantised networks on images, in shards whose results are kept, so that an interruption loses little."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.progress import Progress
from evm_deploy.calib.candidate import QuantizationCandidate, feeds
from evm_deploy.calib.config import QuantizationConfig
from evm_deploy.calib.evaluate import Accuracy, compare_images, float_rows
from evm_deploy.data.images import ImageSet, no_progress, sample
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.sources import Pixels
from evm_deploy.runtimes.base import Runtime
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.tasks.task import Labels, Outputs, Reading, Rows

if TYPE_CHECKING:
    import onnx

Run = Callable[["Shards"], Generator[Outputs, None, None]]  # yields each image's outputs, in their first row
OpenCandidate = Callable[[Any], AbstractContextManager[Runtime]]

COMPARED = 2000  # evaluation images that candidates are compared on; the chosen one is evaluated on all
SHARD = 512  # images whose results are computed and kept together


class Images(Protocol):
    """Evaluation images, decoded already (ImageSet), or in parts as they are needed (LabelledImages)."""

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the network."""
        ...

    @property
    def order(self) -> str:
        """Sentence on how classes got their index."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """Images that could not be read."""
        ...

    def __len__(self) -> int: ...

    def part(self, places: Sequence[int]) -> ImageSet:
        """Return the readable ones of the images at these places, decoded."""
        ...

    def require_readable(self, places: Collection[int]) -> None:
        """Raise CalibrationError if too many of the images at these places could not be read so far."""
        ...


class Evaluation:
    """Accuracy of candidates on images, each measured on the artifact as exported, against the float network.

    places: of the images to take, all by default, in shards of SHARD. A shard is decoded when it is needed, and its
    results depend on nothing but the network and its images. The float network's outputs and each candidate's rows
    (`evaluate.Rows`) are kept in `config.kept`, and not computed again. float_outputs: runs the float network.
    `open_candidate(graph)`: opens a graph as the target will run it. taken: number of rows that an interrupted run has
    left.
    """

    def __init__(
        self,
        images: Images,
        float_outputs: Run,
        config: QuantizationConfig,
        open_candidate: OpenCandidate,
        places: Sequence[int] | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.images, self.config, self.progress = images, config, progress
        self.places = range(len(images)) if places is None else places
        self.taken = 0
        self._float_outputs, self._open_candidate = float_outputs, open_candidate

    def __call__(self, source: QuantizationCandidate, blocks: Collection[str]) -> Accuracy:
        """Return the accuracy of `source` with these blocks quantised.

        Raises CalibrationError if too many images cannot be read.
        """

        def run(images: Shards) -> Generator[Outputs, None, None]:
            with self._open_candidate(source.quantized(blocks)) as runtime:
                yield from run_each(runtime, images, self.config)

        rows = self._rows(f"rows of {source.identity(blocks)}, labelled: {bool(self.config.val)}", run)
        return Accuracy.of(rows, self.config.task, self.config.max_drop)

    def without(self, source: QuantizationCandidate, kept: Collection[str]) -> Accuracy:
        """Return the accuracy of `source` with all blocks quantised except `kept`."""
        return self(source, set(source.blocks) - set(kept))

    def _shards(self) -> Iterator[ImageSet]:
        """Yield the shards, each decoded when it is its turn."""
        for start in range(0, len(self.places), SHARD):
            shard = self.images.part(self.places[start : start + SHARD])
            self.images.require_readable(self.places)
            if len(shard):
                yield replace(shard, progress=partial(self._advance, start))

    def _advance(self, start: int, done: int, total: int) -> None:
        self.progress(start + done, len(self.places))

    def _rows(self, name: str, run: Run) -> Iterator[Rows]:
        """Yield the rows of every shard, in order. name: identity of the network that `run` runs."""
        kept = self.config.kept
        with Shards(run) as candidate, Shards(self._float_outputs) as in_float:
            for shard in self._shards():
                expected = partial(self._expected, shard, in_float)
                labels, reading = self._labelled(shard)
                named = f"{name}, images {shard.digest()}"
                rows = kept.get(named)
                self.taken += len(shard) if kept.inherited(named) else 0
                if rows is None:
                    rows = compare_images(expected(), candidate.outputs(shard), self.config.task, labels, reading)
                    kept.put(named, rows)
                yield {**rows, **self._float_rows(shard, expected)}

    def _float_rows(self, shard: ImageSet, expected: Callable[[], Outputs]) -> Rows:
        """Return the rows of a shard that depend on the float network alone."""
        labels, reading = self._labelled(shard)
        if labels is None:
            return {}
        name = f"float rows, images {shard.digest()}"
        rows = self.config.kept.get(name)
        if rows is None:
            rows = float_rows(expected(), self.config.task, labels, reading)
            self.config.kept.put(name, rows)
        return rows

    def _expected(self, shard: ImageSet, in_float: Shards) -> Outputs:
        """Return the outputs of the float network on a shard."""
        name = f"float, images {shard.digest()}"
        outputs = self.config.kept.get(name)
        if outputs is None:
            outputs = in_float.outputs(shard)
            self.config.kept.put(name, outputs)
        return outputs

    def _labelled(self, shard: ImageSet) -> tuple[Labels | None, Reading]:
        """Return the true answers of a shard's images, None without --val, and how outputs are read to compare them."""
        if not self.config.val:
            return None, self.config.reading
        return shard.labels, replace(self.config.reading, places=shard.places)


class Shards:
    """Images of those shards that a network is run on; it is opened for the first of them, and stays open.

    run: gets this object, and yields the outputs of each image as soon as it has read its pixels. Leaving the `with`
    block closes the network.
    """

    preprocessing: Preprocessing

    def __init__(self, run: Run) -> None:
        self._run = run
        self._waiting: deque[ImageSet] = deque()
        self._stream: Generator[Outputs, None, None] | None = None

    def outputs(self, shard: ImageSet) -> Outputs:
        """Run the network on a shard. Returns its outputs by name, (images, ...)."""
        self._waiting.append(shard)
        self.preprocessing = shard.preprocessing
        if self._stream is None:
            self._stream = self._run(self)
        return stacked(islice(self._stream, len(shard)))

    def pixels(self) -> Iterator[Pixels]:
        """Yield the preprocessed pixels of each image, (H, W, channels) uint8, shard by shard. Raises ImageError."""
        while self._waiting:
            yield from self._waiting.popleft().pixels()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()


def evaluation_stages(images: Images) -> list[Sequence[int]]:
    """Return the places of the images to compare candidates on, and of all images if these are more."""
    every = range(len(images))
    part = sample(every, COMPARED)
    return [part, every] if len(part) < len(every) else [every]


def first_image(images: Images) -> ImageSet:
    """Return the first of the images that is readable, alone. Raises CalibrationError if too many are not."""
    found = (images.part([place]) for place in range(len(images)))
    for each in found:
        images.require_readable(range(len(images)))
        if len(each):
            return each
    raise AssertionError  # more than the share that may be unreadable


def run_each(runtime: Runtime, images: Shards, config: QuantizationConfig) -> Generator[Outputs, None, None]:
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
    model: onnx.ModelProto, config: QuantizationConfig, plugin: Path | None, images: Shards
) -> Generator[Outputs, None, None]:
    """Run a hub graph on every image, in ONNX Runtime. Yields its outputs, those of the image in the first row."""
    with OnnxRuntime(model.SerializeToString(), plugin=plugin) as runtime:
        yield from run_each(runtime, images, config)
