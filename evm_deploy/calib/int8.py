"""From a float graph to an int8 or w8 one: calibrate, quantise, judge, and keep in float what costs too much."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.calib.accuracy import Accuracy, compare, keep_float_until
from evm_deploy.calib.images import ImageSet, calibration_images, labelled_images
from evm_deploy.calib.quantize import Layer, activations, layers, quantize
from evm_deploy.calib.table import CalibrationTable, calibrate
from evm_deploy.model.preprocess import Preprocessing
from evm_deploy.progress import Progress, Step
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.scan.fused import FusedOp

if TYPE_CHECKING:
    import onnx

HELD_OUT_EVERY, MAX_HELD_OUT = 8, 64  # of the calibration images, to judge with where there is no --val
GRAPH_VERSION = 1  # of what is calibrated: BatchNorm folded, biases in the convolutions


@dataclass(frozen=True)
class Request:
    """What to quantise and what to calibrate and judge with; see ExportPlan. num_classes 0: outputs are no classes."""

    precision: str
    calib: Path | None
    images: int
    method: str
    force: bool
    val: Path | None
    max_drop: float | None
    num_classes: int
    labels: tuple[str, ...] | None
    checkpoint_sha256: str
    input: str


@dataclass(frozen=True)
class Quantized:
    """A quantised graph, how good it is, and which blocks stayed in float.

    table: of what the activations did, where they are quantised too. accuracy: None where there were no images to judge
    with. sensitivity: SQNR in dB of each block alone.
    """

    model: onnx.ModelProto
    table: CalibrationTable | None
    accuracy: Accuracy | None
    layers: int
    in_float: tuple[str, ...]
    sensitivity: dict[str, float]
    skipped: tuple[str, ...]


def quantize_graph(
    model: onnx.ModelProto,
    request: Request,
    preprocessing: Preprocessing,
    *,
    fused: Mapping[str, FusedOp],
    plugin: Path | None,
    step: Step,
) -> Quantized:
    """The int8 or w8 form of a hub graph; `fused`: its modules that may become one op. `plugin` makes it quicker.

    Raises CalibrationError; an accuracy out of its limit does not raise, it is in the result.
    """
    found = candidates(model, request.precision, fused)
    blocks = list(dict.fromkeys(block_of(layer.module) for layer in found))
    used, judged = _images(request, preprocessing, step)
    table, ranges = None, {}
    if used:
        with step("calibrate", f"{len(used)} images, {request.method}") as progress:
            table = _calibrate(model, found, used, request, plugin, progress)
            ranges = table.ranges(request.method)

    def build(chosen: Collection[str]) -> onnx.ModelProto:
        """The graph with these blocks quantised."""
        return quantize(model, [layer for layer in found if block_of(layer.module) in chosen], ranges)

    kept: frozenset[str] = frozenset()
    sensitivity: dict[str, float] = {}
    accuracy = None
    if judged:
        with step("judge", f"{len(judged)} images, {'labelled' if request.val else 'without labels'}"):
            evaluate = _evaluator(model, judged, request, plugin)
            accuracy = evaluate(build(blocks))
        if not accuracy.ok and request.max_drop is not None:
            with step("sensitivity", f"{len(blocks)} blocks, one at a time") as progress:
                for done, block in enumerate(blocks):
                    progress(done, len(blocks))
                    sensitivity[block] = evaluate(build([block])).sqnr_db
                ranked = sorted(blocks, key=lambda block: sensitivity[block])
                kept, accuracy = keep_float_until(lambda keep: evaluate(build(set(blocks) - keep)), ranked)
    return Quantized(
        model=build(set(blocks) - kept),
        table=table,
        accuracy=accuracy,
        layers=sum(block_of(layer.module) not in kept for layer in found),
        in_float=tuple(sorted(kept)),
        sensitivity=sensitivity,
        skipped=tuple(dict.fromkeys(text for images in (used, judged) if images for text in images.skipped)),
    )


def candidates(model: onnx.ModelProto, precision: str, fused: Mapping[str, FusedOp]) -> list[Layer]:
    """The layers that become int8.

    int8: of the last its weights alone (its pooled input has too few values to calibrate a range), and of modules that
    may become one op, what that op takes as int8; its results stay float.
    w8: weights alone, all but those of modules that may become one op: that op takes them as float.
    """
    every = layers(model)
    if precision == "w8":
        return [replace(layer, weight_only=True) for layer in every if not _below_any(layer.module, fused)]
    inside = {f"{path}.{layer}" for path, op in fused.items() for layer in op.int8_layers.values()}
    return [
        replace(layer, float_output=layer.float_output or layer.module in inside, weight_only=layer is every[-1])
        for layer in every
        if layer.module in inside or not _below_any(layer.module, fused)
    ]


def block_of(module: str) -> str:
    """What a layer is kept in float with: layers.2.1 of layers.2.1.conv_pw.0, layers.0.downsample of its reduction."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts[:4]) if part.isdigit()]
    end = numbers[-1] + 1 if numbers else 1
    return ".".join(parts[: max(end, 3 if end == 2 else 0)])


def run_all(model: onnx.ModelProto, images: ImageSet, request: Request, plugin: Path | None) -> NDArray[np.float32]:
    """The outputs of `model` on every image, flattened: (images, values)."""
    with OnnxRuntime(model.SerializeToString(), plugin=plugin) as runtime:
        rows = [
            np.concatenate([value[0].ravel() for value in runtime.run({request.input: feed}).values()])
            for feed in _feeds(images, request.input, _batch(runtime))
        ]
    return np.stack(rows)


def _images(request: Request, preprocessing: Preprocessing, step: Step) -> tuple[ImageSet | None, ImageSet | None]:
    """Images to calibrate with, and images to judge with; None where there are none. Only int8 calibrates."""
    used = judged = None
    if request.calib:
        with step("images", f"up to {request.images} of {request.calib}"):
            chosen = calibration_images(request.calib, preprocessing, request.images, force=request.force)
        used, judged = _split(chosen) if request.precision == "int8" else (None, chosen)
    if request.val:
        with step("images", f"labelled, of {request.val}"):
            judged = labelled_images(request.val, preprocessing, request.num_classes, request.labels)
    return used, judged


def _evaluator(
    model: onnx.ModelProto, images: ImageSet, request: Request, plugin: Path | None
) -> Callable[[onnx.ModelProto], Accuracy]:
    """Candidate -> its Accuracy against the float `model` on `images`; the float outputs are computed once."""
    expected = run_all(model, images, request, plugin)
    labels = images.labels if request.val else None

    def evaluate(candidate: onnx.ModelProto) -> Accuracy:
        outputs = run_all(candidate, images, request, plugin)
        return compare(expected, outputs, labels, classes=request.num_classes > 0, limit=request.max_drop)

    return evaluate


def _calibrate(
    model: onnx.ModelProto,
    found: Sequence[Layer],
    images: ImageSet,
    request: Request,
    plugin: Path | None,
    progress: Progress,
) -> CalibrationTable:
    import onnx

    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    keys = activations(found)
    outputs = {value.name for value in tapped.graph.output}
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in keys if name not in outputs)
    identity = {
        "checkpoint_sha256": request.checkpoint_sha256,
        "graph": GRAPH_VERSION,
        "input": request.input,
        "images": {"count": len(images), "sha256": images.digest()},
        "activations": sorted(set(keys.values())),
    }

    def measured(start: int) -> Iterator[dict[str, NDArray[np.float32]]]:
        with OnnxRuntime(tapped.SerializeToString(), plugin=plugin) as runtime:
            for feed in islice(_feeds(images, request.input, _batch(runtime)), start, None):
                values = runtime.run({request.input: feed})
                merged: dict[str, list[NDArray[np.float32]]] = {}
                for name, key in keys.items():  # a module that runs twice has one range
                    merged.setdefault(key, []).append(values[name][0].ravel())
                yield {key: np.concatenate(parts) for key, parts in merged.items()}

    return calibrate(identity, measured, progress=progress)


def _split(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Images to calibrate with, and those kept back to judge with: every eighth, as long as that leaves some."""
    held = set(range(HELD_OUT_EVERY - 1, len(images), HELD_OUT_EVERY)[:MAX_HELD_OUT]) or {len(images) - 1}
    used = tuple(picture for i, picture in enumerate(images.pictures) if i not in held) or images.pictures
    return replace(images, pictures=used), replace(images, pictures=tuple(images.pictures[i] for i in sorted(held)))


def _feeds(images: ImageSet, kind: str, batch: int) -> Iterator[NDArray[Any]]:
    """Each image as the graph reads it, repeated to its smallest batch."""
    for pixels in images.pixels():
        one = pixels[None] if kind == "image" else images.preprocessing.normalise(pixels[None])
        yield np.repeat(one, batch, axis=0)


def _batch(runtime: OnnxRuntime) -> int:
    return next(iter(runtime.inputs.values())).shape[0] or 1


def _below_any(module: str, paths: Iterable[str]) -> bool:
    return any(module == path or module.startswith(path + ".") for path in paths)
