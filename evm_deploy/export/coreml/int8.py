"""int8 and w8 for Core ML programs, on any system: calibrated in the MIL runtime, quantised by coremltools' passes.

coremltools' own calibration calls Core ML, which only a Mac has, and keeps only the ranges of the last sample
(apple/coremltools#2704). So the MIL runtime measures the activations, and the passes that coremltools would run after
its calibration get these ranges.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.progress import Step
from evm_deploy._util.silence import silence_libraries
from evm_deploy.calib.candidate import QuantizationCandidate, feeds
from evm_deploy.calib.config import QuantizationConfig
from evm_deploy.calib.evaluation import OpenCandidate, Shards, first_image
from evm_deploy.calib.histogram import Range
from evm_deploy.calib.int8 import Quantized, choose, image_sets
from evm_deploy.calib.layers import Layer, activations, below_any, nearest
from evm_deploy.calib.table import Activations, CalibrationTable, calibrate
from evm_deploy.data.images import ImageSet
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import ToolchainError
from evm_deploy.export.coreml.coremltools_patch import PATCHED_VERSION, converter, rarely_checked
from evm_deploy.export.coreml.probes import float_run, probed, tensors_of
from evm_deploy.scan import mil
from evm_deploy.tasks.task import Outputs

if TYPE_CHECKING:
    from evm_deploy.runtimes.mil import MilRuntime, Program

TYPES = ("conv", "linear")  # the passes do not take matmul; add would quantise the scan
ACTIVATIONS = ("relu", "sigmoid", "tanh")  # quantised together with the layer before
PAIRS = ("insert_prefix_quantize_dequantize_pair", "insert_suffix_quantize_dequantize_pair")


def quantize_program(
    model: Any,
    module: Any,
    config: QuantizationConfig,
    preprocessing: Preprocessing,
    *,
    modules: Mapping[str, str],
    int8_inside: Mapping[str, Collection[str]],
    open_candidate: OpenCandidate,
    step: Step,
) -> Quantized:
    """Quantise a float16 `model` (coremltools' MLModel) to int8 or w8. Accuracy is against the float `module`.

    modules: weight name -> module path. int8_inside: module path -> the layers inside that get int8 activations; other
    layers of the module do not. `open_candidate(model)`: open a model in the runtime that verifies it. Raises
    CalibrationError. An accuracy beyond its limit raises no error: it is in the result.
    """
    from evm_deploy.runtimes.mil import MilRuntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float16.mlpackage"
        with silence_libraries():
            model.save(str(path))
            saved = converter().models.MLModel(str(path), skip_model_load=True)
        with MilRuntime(path) as runtime:
            found = quantizable_ops(runtime.program, modules, config, int8_inside)
            images = image_sets(config, preprocessing, step)
            table = _calibrate(runtime, found, images.used, config, step) if images.used else None
            if config.precision == "w8":
                found = [replace(layer, weight_only=True) for layer in found]
            ranges = table.ranges(config.method) if table else {}
            source = QuantizationCandidate(saved, found, config.blocks, table, ranges, rewrite=quantize_layers)

            def float_outputs(evaluated: Shards) -> Generator[Outputs, None, None]:
                for feed in feeds(evaluated, config.input, runtime):
                    yield float_run(module, feed)[0]

            if images.evaluation:
                shown = next(feeds(first_image(images.evaluation), config.input, runtime))
                tensors = tensors_of(runtime.program, modules, float_run(module, shown)[1])
                open_candidate = probed(open_candidate, tensors)
            return choose({"": source}, images, config, float_outputs, open_candidate, step)


def quantizable_ops(
    program: Program, modules: Mapping[str, str], config: QuantizationConfig, int8_inside: Mapping[str, Collection[str]]
) -> list[Layer]:
    """Return the layers of a program that can be quantised, like `calib.int8.candidates` for an ONNX graph."""
    every = [op for op in program.operations if op.type in TYPES and _plain(op.weight) in modules]
    readers = {name: op for op in reversed(program.operations) for name in op.reads}
    beside = layers_beside_scans(program, config.float_around_scans)
    found = []
    for op in every:
        module, writes = modules[_plain(op.weight)], op.results[0].name
        if writes in beside or below_any(module, config.keep_float):
            continue
        if writes in readers and readers[writes].type in ACTIVATIONS:
            writes = readers[writes].results[0].name
        inside = next((names for path, names in int8_inside.items() if module.startswith(path + ".")), None)
        alone = below_any(module, config.weight_only) or (inside is not None and module not in inside)
        found.append(Layer(op.name, module, str(op.variables["x"]), writes, op.weight, weight_only=alone))
    return found


def layers_beside_scans(program: Program, around: bool) -> set[str]:
    """Return the results of the TYPES ops nearest to scans, which write their delta, B and C.

    around: also those that write u and read y.
    """
    scans = [op for op in program.operations if _is_scan(op)]
    feeds = re.compile(rf"{mil.PREFIX}_.*_(?:{'|'.join(mil.FEEDS)})")
    producers = {result.name: [op] for op in program.operations for result in op.results}
    fed = (name for op in scans if feeds.fullmatch(op.name) for name in op.reads)
    found = _nearest(producers, lambda op: op.reads, fed)
    if around:
        readers: dict[str, list[Any]] = {}
        for op in program.operations:
            for name in op.reads:
                readers.setdefault(name, []).append(op)

        def before(op: Any) -> Iterable[str]:  # not through a residual or a norm, as in calib.layers
            residual = op.type == "add" and len([*op.reads]) > 1
            return () if residual or op.type.endswith("_norm") else op.reads

        found |= _nearest(producers, before, (name for op in scans for name in op.reads))
        written = (result.name for op in scans for result in op.results)
        found |= _nearest(readers, lambda op: [result.name for result in op.results], written)
    return found


def _nearest(
    neighbours: Mapping[str, Sequence[Any]], onward: Callable[[Any], Iterable[str]], tensors: Iterable[str]
) -> set[str]:
    """Return the results of the first TYPES ops on every way from these tensors. A scan ends a way, too."""
    found = nearest(neighbours, lambda op: op.type in TYPES, lambda op: () if _is_scan(op) else onward(op), tensors)
    return {op.results[0].name for op in found}


def _is_scan(op: Any) -> bool:
    return bool(op.name.startswith(f"{mil.PREFIX}_"))


def quantize_layers(model: Any, chosen: Sequence[Layer], ranges: Mapping[str, Range]) -> Any:
    """Return `model` with the layers `chosen` quantised. `model` must have been saved and opened again.

    Weights: int8, one scale per output channel. Activations: between quantize and dequantize over `ranges`, which are
    keyed as in a calibration table. Raises ToolchainError if coremltools is not PATCHED_VERSION.
    """
    if metadata.version("coremltools") != PATCHED_VERSION:
        raise ToolchainError(
            f"int8 and w8 for Core ML use private passes of coremltools {PATCHED_VERSION}",
            f"pip install coremltools=={PATCHED_VERSION}",
        )
    ct = converter()
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.converter import mil_convert
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models.utils import _apply_graph_pass

    def prepared(name: str, **options: Any) -> Any:
        found = copy.copy(PASS_REGISTRY[name])  # the registry's own instance would keep these options for later users
        found.set_options([PassOption(key, value) for key, value in options.items()])
        return found

    weight = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=0)
    activation = cto.OpLinearQuantizerConfig(mode="linear")
    rounded = [layer for layer in chosen if not layer.weight_only]
    pairs = cto.OptimizationConfig(op_name_configs={layer.node: activation for layer in rounded})
    covered = {name: ranges[key] for name, key in activations(rounded).items()}
    stats = {name: {"rmin": each.low, "rmax": each.high} for name, each in covered.items()}
    weights = cto.OptimizationConfig(op_name_configs={layer.weight: weight for layer in chosen})
    spec = model.get_spec()
    version = max(spec.specificationVersion, ct._SPECIFICATION_VERSION_IOS_17 if rounded else 0)
    with silence_libraries(), rarely_checked():
        passes = [
            *(prepared(f"compression::{name}", config=pairs, activation_stats=stats) for name in PAIRS if rounded),
            PASS_REGISTRY["common::dequantize_quantize_pair_elimination"],
            prepared("compression::linear_quantize_weights", config=weights, joint_compression=False),
        ]
        program = _apply_graph_pass(model, passes, spec_version=version, pymil_load_func=load, return_pymil_prog=True)
        return mil_convert(
            program,
            convert_to="mlprogram",
            convert_from="milinternal",
            specification_version=version,
            compute_units=model.compute_unit,
            model_description=spec.description,
            pass_pipeline=ct.PassPipeline.CLEANUP,  # the float program has been through the other passes
            skip_model_load=True,
        )


def _calibrate(
    runtime: MilRuntime, found: Sequence[Layer], images: ImageSet, config: QuantizationConfig, step: Step
) -> CalibrationTable:
    keys = activations(found)
    identity = {
        "checkpoint_sha256": config.checkpoint_sha256,
        "graph": "mlprogram float16",
        "input": config.input,
        "images": {"count": len(images), "sha256": images.digest()},
        "activations": sorted(set(keys.values())),
    }
    (name,) = runtime.inputs

    def measured(start: int) -> Iterator[Activations]:
        for feed in islice(feeds(images, config.input, runtime), start, None):
            values = runtime.run({name: feed}, list(keys))
            merged: dict[str, list[NDArray[np.float32]]] = {}
            for tensor, key in keys.items():  # a module that runs twice has one key
                merged.setdefault(key, []).append(values[tensor][0].ravel())
            yield {key: np.concatenate(parts) for key, parts in merged.items()}

    with step("calibrate", f"{len(images)} images, {config.method}, in the MIL runtime") as progress:
        return calibrate(identity, measured, progress=progress)


def _plain(weight: str) -> str:
    return weight.removesuffix("_to_fp16")
