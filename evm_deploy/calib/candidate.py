"""Float networks to quantise, calibrated as they are or smoothed first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.onnx import constants_sha256
from evm_deploy._util.progress import Step
from evm_deploy.calib.config import QuantizationConfig
from evm_deploy.calib.histogram import Range
from evm_deploy.calib.layers import Layer, activations, below_any
from evm_deploy.calib.quantize import insert_qdq
from evm_deploy.calib.smooth import smooth, smooth_groups
from evm_deploy.calib.table import Activations, CalibrationTable, calibrate
from evm_deploy.data.images import ImageSet
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.sources import Pixels
from evm_deploy.runtimes.base import Runtime
from evm_deploy.runtimes.onnxruntime import OnnxRuntime

if TYPE_CHECKING:
    import onnx

GRAPH_VERSION = 2  # version of the calibrated graph: BatchNorm folded, biases in the convolutions, moves merged


@dataclass(frozen=True)
class QuantizationCandidate:
    """A float network with the layers that can be quantised, and the ranges of their activations if these are int8 too.

    paths: modules that fall back to float as a whole (ModelSpec.blocks).
    rewrite: (model, layers, ranges) -> a copy of the model with these layers quantised; by default `insert_qdq`.
    """

    model: Any
    layers: Sequence[Layer]
    paths: Sequence[str]
    table: CalibrationTable | None = None
    ranges: Mapping[str, Range] = field(default_factory=dict)
    rewrite: Callable[[Any, Sequence[Layer], Mapping[str, Range]], Any] | None = None
    _made: dict[frozenset[str], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def blocks(self) -> list[str]:
        """Blocks that hold the layers, in the order of the layers and without repeats."""
        return list(dict.fromkeys(map(self.block_of, self.layers)))

    def quantized(self, blocks: Collection[str]) -> Any:
        """Return the network with the layers of these blocks quantised. Callers must not change it.

        The last network is kept: the one that is evaluated is most often the one that is exported.
        """
        wanted = frozenset(blocks)
        if wanted not in self._made:
            self._made.clear()
            chosen = [layer for layer in self.layers if self.block_of(layer) in wanted]
            self._made[wanted] = (self.rewrite or insert_qdq)(self.model, chosen, self.ranges_at_both_ends())
        return self._made[wanted]

    def ranges_at_both_ends(self) -> dict[str, Range]:
        """Return the ranges, also by the key that an activation has where only one of its two layers is quantised.

        With both layers it has the key of the layer that reads it (`activations`).
        """
        keys, found = activations(self.layers), dict(self.ranges)
        for layer in self.layers:
            for end, tensor in (("input", layer.reads), ("output", layer.writes)):
                known = self.ranges.get(keys.get(tensor, ""))
                if known:
                    found.setdefault(f"{layer.module}:{end}", known)
        return found

    def identity(self, blocks: Collection[str]) -> str:
        """Return a text of all that makes `quantized(blocks)` of the network: layers, ranges and calibration table."""
        chosen = sorted(repr(layer) for layer in self.layers if self.block_of(layer) in blocks)
        return repr((self.table.key if self.table else "", sorted(self.ranges.items()), chosen))

    def block_of(self, layer: Layer) -> str:
        """Return the block of a layer: the innermost of `paths` around it, else the first part of the layer's path."""
        around = [path for path in self.paths if below_any(layer.module, [path])]
        return max(around, key=len, default=layer.module.split(".")[0])


def make_candidates(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    images: ImageSet | None,
    config: QuantizationConfig,
    plugin: Path | None,
    step: Step,
) -> dict[str, QuantizationCandidate]:
    """Return the networks to quantise, calibrated on `images`: `off` (the graph as it is), `on` (smoothed) or both.

    config.smooth `auto` gives both. Only `off` is returned if no activation can be smoothed, and without images,
    because int8 weights alone gain nothing from smoothing. Raises CalibrationError.
    """
    if images is None:
        return {"off": QuantizationCandidate(model, layers, config.blocks)}
    keys = activations(layers)
    identity = {
        "checkpoint_sha256": config.checkpoint_sha256,
        "graph": GRAPH_VERSION,
        "input": config.input,
        "images": {"count": len(images), "sha256": images.digest()},
        "activations": sorted(set(keys.values())),
    }

    def calibrated(graph: onnx.ModelProto, what: str, axes: Mapping[str, int], **facts: Any) -> CalibrationTable:
        with step("calibrate", f"{len(images)} images, {what}") as progress:
            measured = _activations(graph, keys, axes, images, config.input, plugin)
            return calibrate({**identity, **facts}, measured, progress=progress)

    axes = {} if config.smooth == "off" else _channel_axes(model, keys)
    if not axes:
        table = calibrated(model, config.method, axes)
        return {"off": QuantizationCandidate(model, layers, config.blocks, table, table.ranges(config.method))}
    found = {}
    table = calibrated(model, f"{config.method}, by channel", axes, channels=sorted({keys[name] for name in axes}))
    if config.smooth == "auto":
        found["off"] = QuantizationCandidate(model, layers, config.blocks, table, table.ranges(config.method))
    smoothed = copy.deepcopy(model)
    smooth(smoothed, {name: table.channel_maxima[keys[name]] for name in axes})
    table = calibrated(smoothed, f"{config.method}, smoothed", {}, smoothed=constants_sha256(smoothed))
    return {**found, "on": QuantizationCandidate(smoothed, layers, config.blocks, table, table.ranges(config.method))}


class Readable(Protocol):
    """Images whose pixels can be read: an ImageSet, or several."""

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing that the pixels have gone through."""
        ...

    def pixels(self) -> Iterator[Pixels]:
        """Yield the preprocessed pixels of each image, (H, W, channels) uint8."""
        ...


def feeds(images: Readable, kind: str, runtime: Runtime) -> Iterator[NDArray[Any]]:
    """Yield each image as the graph reads it, repeated to the smallest batch of the runtime's input."""
    batch = next(iter(runtime.inputs.values())).shape[0] or 1
    for pixels in images.pixels():
        one = pixels[None] if kind == "image" else images.preprocessing.normalise(pixels[None])
        yield np.repeat(one, batch, axis=0)


def _channel_axes(model: onnx.ModelProto, keys: Mapping[str, str]) -> dict[str, int]:
    """Return the channel axis of each activation that can be smoothed and becomes int8, by tensor name."""
    return {read.tensor: read.axis for each in smooth_groups(model) for read in each.reads if read.tensor in keys}


def _activations(
    model: onnx.ModelProto,
    keys: Mapping[str, str],
    axes: Mapping[str, int],
    images: ImageSet,
    kind: str,
    plugin: Path | None,
) -> Callable[[int], Iterator[Activations]]:
    """Return a function that yields, from the n-th image on, the values of the tensors in `keys`, by key, per image.

    Values of tensors in `axes` have their channels last. A module that runs twice has one key: its values are joined.
    """
    import onnx

    tapped = copy.deepcopy(model)
    outputs = {value.name for value in tapped.graph.output}
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in keys if name not in outputs)

    def measured(start: int) -> Iterator[Activations]:
        with OnnxRuntime(tapped.SerializeToString(), plugin=plugin) as runtime:
            for feed in islice(feeds(images, kind, runtime), start, None):
                values = runtime.run({kind: feed})
                merged: dict[str, list[NDArray[np.float32]]] = {}
                for name, key in keys.items():
                    merged.setdefault(key, []).append(_by_channel(values[name][0], axes.get(name)))
                yield {key: np.concatenate(parts) for key, parts in merged.items()}

    return measured


def _by_channel(values: NDArray[np.float32], axis: int | None) -> NDArray[np.float32]:
    """Reshape to (values, channels), or to one axis if `axis` is None."""
    if axis is None:
        return values.ravel()
    return np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
