"""Quantisation of a float network to int8 or w8: calibrate, quantise, evaluate, keep sensitive blocks in float."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evm_deploy._util.progress import Progress, Step
from evm_deploy.calib.candidate import QuantizationCandidate, make_candidates
from evm_deploy.calib.config import QuantizationConfig
from evm_deploy.calib.evaluate import Accuracy, keep_float_until
from evm_deploy.calib.evaluation import Evaluation, Images, OpenCandidate, Run, evaluation_stages, graph_outputs
from evm_deploy.calib.layers import Layer, below_any, quantizable_layers
from evm_deploy.calib.probe import with_probes, without_probes
from evm_deploy.calib.quantize import insert_qdq
from evm_deploy.calib.saturation import saturating_weights
from evm_deploy.calib.table import CalibrationTable
from evm_deploy.data.images import ImageSet, calibration_images, labelled_images
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import CalibrationError
from evm_deploy.scan.fused import FusedOp
from evm_deploy.tasks import TITLES

if TYPE_CHECKING:
    import onnx

HELD_OUT_EVERY, MAX_HELD_OUT = 8, 64  # calibration images held out for evaluation without --val


class ImageSets(NamedTuple):
    """Calibration images (`used`) and evaluation images (`evaluation`); None for no images."""

    used: ImageSet | None
    evaluation: Images | None


@dataclass(frozen=True)
class Quantized:
    """A quantised network, its accuracy, and the blocks that stay in float.

    table: calibration table, if activations are int8 too. accuracy: None without evaluation images. smooth: `on`,
    `off`, or "" if the target does not smooth. tried: accuracy of each candidate with all blocks quantised, by the
    value of smooth. layers: number of quantised layers. in_float: blocks kept in float. sensitivity: SQNR in dB with
    only this block quantised. skipped: messages on images that were left out. remarks: sentences on the evaluation.
    evaluated_on: digest of the evaluation images, empty without them. saturating: weights whose uint8 x int8 products
    can saturate on x86 CPUs without VNNI; None for targets without such products.
    """

    model: Any
    table: CalibrationTable | None
    accuracy: Accuracy | None
    smooth: str
    tried: dict[str, Accuracy]
    layers: int
    in_float: tuple[str, ...]
    sensitivity: dict[str, float]
    skipped: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    evaluated_on: str = ""
    saturating: tuple[str, ...] | None = None


def quantize_graph(
    model: onnx.ModelProto,
    config: QuantizationConfig,
    preprocessing: Preprocessing,
    *,
    fused: Mapping[str, FusedOp],
    open_candidate: OpenCandidate,
    plugin: Path | None,
    step: Step,
    symmetric: bool = False,
    rounded_outputs: bool = False,
    saturates: bool = True,
) -> Quantized:
    """Quantise a hub graph to int8 or w8.

    fused: module path -> op, for modules that may become one op. symmetric: use no zero points. rounded_outputs: round
    the output of every layer, for runtimes whose int8 layers give int8 alone. saturates: whether the runtime has
    kernels with products of uint8 and int8 that can saturate (`saturating_weights`); without zero points none has.
    `open_candidate(graph)`: open a graph as the target will run it, for evaluation. plugin: native library of ONNX
    Runtime, which makes calibration faster. Raises CalibrationError. An accuracy beyond its limit raises no error: it
    is in the result.
    """
    found = candidates(
        model,
        config.precision,
        fused,
        config.keep_float,
        config.weight_only,
        float_around_scans=config.float_around_scans,
        fuses=config.fuses,
    )
    if not found:
        raise CalibrationError(
            f"no layer of the network can become {config.precision}: all stand beside a scan, or must stay in float",
            "export it in float32 or float16",
        )
    images = image_sets(config, preprocessing, step)
    probed = with_probes(model)
    choices = make_candidates(probed, found, images.used, config, plugin, step)
    how = partial(insert_qdq, symmetric=symmetric, rounded_outputs=rounded_outputs)
    rewrite = partial(how, weight_bits=config.weight_bits)
    choices = {name: replace(source, rewrite=rewrite) for name, source in choices.items()}
    chosen = choose(choices, images, config, partial(graph_outputs, probed, config, plugin), open_candidate, step)
    looked_for = config.precision == "int8" and saturates and not symmetric
    saturating = tuple(saturating_weights(chosen.model)) if looked_for else None
    return replace(chosen, model=without_probes(chosen.model), saturating=saturating)


def choose(
    choices: Mapping[str, QuantizationCandidate],
    images: ImageSets,
    config: QuantizationConfig,
    float_outputs: Run,
    open_candidate: OpenCandidate,
    step: Step,
) -> Quantized:
    """Choose the most accurate of `choices`, and keep its most sensitive blocks in float.

    choices: by name, as in Quantized.smooth. Accuracy is measured on the artifact as exported, against `float_outputs`
    on the same images: candidates are compared on COMPARED images, drawn with a fixed seed, and the chosen one is
    evaluated on all. Without evaluation images the first choice is taken, with all blocks quantised. Blocks stay in
    float only if config.max_drop is set and the accuracy is beyond its limit.
    """
    smooth = next(iter(choices))
    tried: dict[str, Accuracy] = {}
    accuracy: Accuracy | None = None
    kept: frozenset[str] = frozenset()
    sensitivity: dict[str, float] = {}
    compare: Evaluation | None = None
    every = images.evaluation
    stages = evaluation_stages(every) if every else []
    for places in stages:
        assert every
        with step("evaluate", f"{len(places)} images, {'labelled' if config.val else 'without labels'}") as progress:
            evaluate = Evaluation(every, float_outputs, config, open_candidate, places, progress)
            if compare is None:
                compare = evaluate
                tried = {name: evaluate(each, each.blocks) for name, each in choices.items()}
                smooth = max(tried, key=lambda name: tried[name].rank)
                accuracy = tried[smooth]
            else:
                accuracy = evaluate.without(choices[smooth], kept)
        if evaluate.taken:
            say(step, f"{evaluate.taken:,} evaluations of an image taken from the interrupted run")
        if accuracy.ok or config.max_drop is None:
            continue
        source = choices[smooth]
        if not sensitivity:
            with step("sensitivity", f"{len(source.blocks)} blocks, one at a time") as progress:
                sensitivity = {block: alone.sqnr_db or 0.0 for block, alone in each_block(source, compare, progress)}
        more = sorted((block for block in source.blocks if block not in kept), key=sensitivity.__getitem__)
        with step("in float", f"the most sensitive blocks, until at most {config.max_drop:g} points are lost"):
            kept, accuracy = keep_float_until(partial(evaluate.without, source), more, kept, accuracy)
    source = choices[smooth]
    return Quantized(
        model=source.quantized(set(source.blocks) - kept),
        table=source.table,
        accuracy=accuracy,
        smooth=smooth,
        tried=tried,
        layers=len({layer.weight for layer in source.layers if source.block_of(layer) not in kept}),
        in_float=tuple(sorted(kept)),
        sensitivity=sensitivity,
        evaluated_on=every.part(range(len(every))).digest() if every else "",
        skipped=tuple(dict.fromkeys(text for each in images if each for text in each.skipped)),
        remarks=tuple(_remarks(every.order if every else "", list(map(len, stages)), accuracy, config)),
    )


def _remarks(order: str, stages: Sequence[int], accuracy: Accuracy | None, config: QuantizationConfig) -> Iterator[str]:
    """Yield what users must know to read an accuracy: the order of the classes, chance, and which images were used.

    stages: number of images of each stage.
    """
    if order:
        yield order
    score = config.task.score
    if accuracy and score and accuracy.gated and score.by_chance(accuracy.reached, accuracy.images, config.num_classes):
        yield (
            f"the float network reaches {TITLES[score.metric]} {accuracy.reached:.1%} on {accuracy.images} "
            "images, which chance could give too: the order of the classes may not be the network's, and this accuracy "
            "proves nothing"
        )
    if len(stages) > 1:
        yield f"candidates were compared on {stages[0]} images, the chosen one on all {stages[1]}"


def each_block(
    source: QuantizationCandidate, evaluate: Evaluation, progress: Progress
) -> Iterator[tuple[str, Accuracy]]:
    """Yield every block with the accuracy of the network when only this block is quantised."""
    for done, block in enumerate(source.blocks):
        progress(done, len(source.blocks))
        yield block, evaluate(source, [block])


def candidates(
    model: onnx.ModelProto,
    precision: str,
    fused: Mapping[str, FusedOp],
    keep_float: Collection[str] = (),
    weight_only: Collection[str] = (),
    *,
    float_around_scans: bool = False,
    fuses: bool = False,
) -> list[Layer]:
    """Return the layers that become int8.

    keep_float: paths of modules whose layers are left out. float_around_scans: as in ModelSpec. fuses: whether modules
    that may become one op become it.
    Precision int8: in a module that may become one op, only the layers that the op takes as int8, those before the
    scan if the module becomes the op; their outputs stay float. In the modules `weight_only` only weights become int8.
    Precision w8: only weights become int8. Modules that may become one op are left out, because the op takes float
    weights.
    """
    ops = fused.values() if fuses and precision == "int8" else ()
    taken = {op.constants[name] for op in ops for name in op.int8_scan_inputs}
    every = quantizable_layers(model, keep_float, float_around_scans=float_around_scans, scan_inputs=taken)
    if precision == "w8":
        return [replace(layer, weight_only=True) for layer in every if not below_any(layer.module, fused)]
    inside = {f"{path}.{layer}" for path, op in fused.items() for layer in op.int8_layers.values()}
    return [
        replace(
            layer,
            float_output=layer.float_output or layer.module in inside,
            weight_only=below_any(layer.module, weight_only),
        )
        for layer in every
        if layer.module in inside or layer.stacked or not below_any(layer.module, fused)
    ]


def image_sets(config: QuantizationConfig, preprocessing: Preprocessing, step: Step) -> ImageSets:
    """Find the calibration and evaluation images of a config. Raises CalibrationError.

    Only int8 calibrates. With `val`, evaluation images are those of `val`. Without `val`, w8 is evaluated on the images
    of `calib`, and int8 on a part of these images that is held out.
    """
    used: ImageSet | None = None
    evaluated: Images | None = None
    if config.calib:
        with step("images", f"up to {config.images} from {config.calib}") as progress:
            chosen = calibration_images(
                config.calib, preprocessing, config.images, force=config.force, progress=progress
            )
        used, evaluated = _split(chosen) if config.precision == "int8" else (None, chosen)
    if config.val and config.task.score:
        with step("images", f"labelled, from {config.val}"):
            evaluated = listed = labelled_images(
                *(config.val, preprocessing, config.num_classes, config.labels),
                read=config.task.score.read,
                folder=config.kept.folder,
            )
        if listed.kept:
            say(step, f"{listed.kept:,} of {len(listed):,} images taken from the interrupted run")
    return ImageSets(used, evaluated)


def say(step: Step, text: str) -> None:
    """Report a fact among the steps, as a step that takes no time."""
    with step("resume", text):
        pass


def _split(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Split into images to calibrate with and images held out for evaluation: every eighth image, up to MAX_HELD_OUT.

    Of fewer than eight images the last one is held out. A single image is used for both.
    """
    held = set(range(HELD_OUT_EVERY - 1, len(images), HELD_OUT_EVERY)[:MAX_HELD_OUT]) or {len(images) - 1}
    used = tuple(item for i, item in enumerate(images.items) if i not in held) or images.items
    return replace(images, items=used), replace(images, items=tuple(images.items[i] for i in sorted(held)))
