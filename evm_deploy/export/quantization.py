"""int8 and w8 in an export: from the plan to a quantised graph, and its description in the manifest."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy import __version__
from evm_deploy._util.cores import cpu_model, usable_cores
from evm_deploy._util.files import artifact_bytes, sha256
from evm_deploy._util.kept import KeptResults, kept_results
from evm_deploy._util.packages import package_versions
from evm_deploy._util.progress import Step
from evm_deploy.bundle.manifest import Decision, Manifest
from evm_deploy.calib.config import QuantizationConfig
from evm_deploy.calib.evaluate import MIN_SQNR_DB
from evm_deploy.calib.evaluation import OpenCandidate
from evm_deploy.calib.int8 import Quantized
from evm_deploy.data.boxes import DEFAULT_SELECTION
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.demo import images_path
from evm_deploy.errors import AccuracyError, ToolchainError
from evm_deploy.export.plan import CALIBRATED, DEFAULT_WEIGHT_BITS, QUANTIZED, ExportPlan
from evm_deploy.export.target import Target, Traced, library_here, native_library, open_here
from evm_deploy.model.network import ModelSpec
from evm_deploy.runtimes.base import RunOptions, Runtime
from evm_deploy.tasks import TITLES, get_task
from evm_deploy.toolchain.plugins import find_plugin

TABLE = "calibration.json"
PACKAGES = ("torch", "onnx", "onnxruntime", "numpy", "PIL")  # that compute or decode, beside those of the target
#: Settings of a plan that choose among candidates, or are in the identity of a candidate's ranges.
CHOOSING = ("calib", "calib_images", "calib_method", "smooth", "force_calib", "max_drop", "tol")
WARM_UP, TIMED = 3, 15  # runs of each precision, to measure the gain in speed
WORTH_IT = 1.05  # times as fast as float32; int8 below it gets a note


def quantize(
    traced: Any,
    plan: ExportPlan,
    spec: ModelSpec,
    preprocessing: Preprocessing,
    target: Target,
    kept: KeptResults,
    step: Step,
) -> tuple[Any, Quantized | None]:
    """Quantise the traced network if the plan asks for it. Returns the network, and the result or None.

    kept: results of an interrupted export (`keeping`). Raises CalibrationError for images that cannot be used.
    """
    if plan.precision not in QUANTIZED:
        return traced, None
    open_candidate = candidate_opener(target, traced, plan)
    config = replace(quantization_config(plan, spec), fuses=target.fuses(plan), kept=kept)
    quantized = target.quantize(traced, config, preprocessing, open_candidate, step)
    return replace(traced, model=quantized.model), quantized


def keeping(
    traced: Traced, plan: ExportPlan, spec: ModelSpec, preprocessing: Preprocessing, target: Target
) -> AbstractContextManager[KeptResults]:
    """Return a context manager that keeps the results of an evaluation until its block ends without an exception.

    Results are found again by all that decides them: network, plan, packages, native libraries and processor. Images,
    quantised layers and ranges are in the names of the results, so that the plan's choice among candidates may change.
    """
    if plan.precision not in QUANTIZED:
        return nullcontext(KeptResults())
    try:
        library = library_here(target)
    except ToolchainError:
        library = None
    libraries = {each for each in (library, find_plugin("onnxruntime")) if each}
    identity = {
        "versions": {"evm_deploy": __version__, **package_versions(PACKAGES), **target.environment().versions},
        "weights": weights_sha256(spec.checkpoint),
        "network": traced.sha256,
        "plan": {key: value for key, value in plan.as_dict().items() if key not in CHOOSING},
        "preprocessing": asdict(preprocessing),
        "libraries": sorted(map(sha256, libraries)),
        "processor": [cpu_model(), usable_cores()],
    }
    return kept_results(identity)


def candidate_opener(target: Target, traced: Any, plan: ExportPlan) -> OpenCandidate:
    """Return a function that builds a candidate network exactly as an export does, and opens it.

    Accuracy is then measured on the real artifact.
    """

    @contextmanager
    def open_candidate(candidate: Any) -> Iterator[Runtime]:
        with tempfile.TemporaryDirectory() as folder:
            artifact = target.build(replace(traced, model=candidate), plan, Path(folder))
            options = RunOptions(plugin=native_library(target, artifact))
            with open_here(target, artifact.path, options) as runtime:
                yield runtime

    return open_candidate


def quantization_config(plan: ExportPlan, spec: ModelSpec) -> QuantizationConfig:
    """Return the settings of quantisation, from a complete plan and the network's spec."""
    return QuantizationConfig(
        precision="int8" if plan.precision in CALIBRATED else str(plan.precision),
        calib=images_path(plan.calib, "train", spec.task) if plan.calib else None,
        images=plan.calib_images,
        method=plan.calib_method,
        smooth=plan.smooth,
        force=plan.force_calib,
        val=images_path(plan.val, "heldout", spec.task) if plan.val else None,
        max_drop=plan.max_drop,
        num_classes=spec.num_classes,
        labels=plan.labels,
        checkpoint_sha256=weights_sha256(spec.checkpoint),
        input=plan.input,
        task=get_task(spec.task),
        blocks=spec.blocks,
        keep_float=spec.keep_float,
        weight_only=spec.weight_only,
        float_around_scans=spec.float_around_scans,
        weight_bits=plan.weight_bits or DEFAULT_WEIGHT_BITS,
        selection=plan.selection or DEFAULT_SELECTION,
    )


def weights_sha256(checkpoint: Mapping[str, Any]) -> str:
    """Return the SHA-256 that identifies the weights taken from a checkpoint: one file may hold several sets."""
    taken = [checkpoint.get(key) for key in ("sha256", "container", "prefix", "dropped")]
    return hashlib.sha256(json.dumps(taken).encode()).hexdigest()


@dataclass(frozen=True)
class Gain:
    """Gain of an artifact over the float32 export of its network.

    speed: times as fast on this machine. size: bytes of the artifact, divided by those of the float32 artifact.
    """

    speed: float
    size: float


def gain_over_float32(
    target: Target, traced: Any, plan: ExportPlan, artifact: Path, plugin: Path | None, test_inputs: NDArray[Any]
) -> Gain:
    """Compare the artifact with the float32 export of `traced`: speed and size.

    Speed: one thread, both artifacts in turn, median of the ratios. test_inputs: (n, ...); the first is run.
    """
    feeds = {plan.input: np.repeat(test_inputs[:1], plan.batch.min, axis=0)}
    with tempfile.TemporaryDirectory() as folder:
        other = target.build(traced, plan.in_float32(), Path(folder))
        size = artifact_bytes(artifact) / artifact_bytes(other.path)
        options = RunOptions(threads=1, plugin=plugin)
        with target.runtime.open(other.path, options) as slow, target.runtime.open(artifact, options) as fast:
            ratios = []
            for _ in range(WARM_UP + TIMED):
                times = []
                for runtime in (slow, fast):
                    start = time.perf_counter()
                    runtime.run(feeds)
                    times.append(time.perf_counter() - start)
                ratios.append(times[0] / times[1])
    return Gain(statistics.median(ratios[WARM_UP:]), size)


def with_quantization(manifest: Manifest, quantized: Quantized, gain: Gain | None, folder: Path) -> Manifest:
    """Add to the manifest how the network was quantised, and its accuracy, speed and size.

    The calibration table, if any, is written to `folder`. gain: None if the artifact runs in an emulator only.
    """
    facts: dict[str, Any] = {
        "int8_layers": quantized.layers,
        "in_float": list(quantized.in_float),
        "sensitivity_sqnr_db": quantized.sensitivity,
    }
    if gain:
        facts |= {"speed_over_fp32_here": round(gain.speed, 2), "size_of_fp32": round(gain.size, 3)}
    notes = [*quantized.remarks, *(f"image left out: {text}" for text in quantized.skipped)]
    if quantized.table:
        (folder / TABLE).write_text(quantized.table.to_json(), encoding="utf-8")
        facts |= {"method": manifest.plan["calib_method"], "calibration": quantized.table.identity}
        if quantized.smooth:
            facts["smooth"] = asdict(smoothing(quantized, manifest.plan["smooth"]))
    if quantized.saturating is not None:
        bits = weight_bits(quantized.saturating, manifest.plan["weight_bits"] or DEFAULT_WEIGHT_BITS)
        facts["weight_bits"] = asdict(bits)
    if manifest.precision == "int8" and gain and gain.speed < WORTH_IT:  # w8 is for size
        notes.append(f"int8 is {gain.speed:.2f}x as fast as float32 on this machine: no useful gain")
    return replace(
        manifest,
        accuracy={**quantized.accuracy.as_dict(), "images_sha256": quantized.evaluated_on}
        if quantized.accuracy
        else None,
        details={**manifest.details, "quantization": facts},
        notes=[*manifest.notes, *notes],
    )


def weight_bits(saturating: Sequence[str], bits: int) -> Decision:
    """Return the bits of the int8 weights, with the reason. saturating: as in `Quantized`."""
    if not saturating:
        return Decision(str(bits), "no product can saturate: the accuracy is the same on x86 CPUs without VNNI")
    return Decision(
        str(bits),
        f"products of {len(saturating)} layers can saturate on x86 CPUs without VNNI, and cost accuracy there; "
        "--weight-bits 7 avoids it",
    )


def smoothing(quantized: Quantized, asked: str) -> Decision:
    """Return whether activations were smoothed, with the reason."""
    if asked != "auto" and asked == quantized.smooth:
        return Decision(asked, "as asked")
    if len(quantized.tried) < 2:
        return Decision("off", "no activation of this network can be smoothed")
    figures = {
        name: "".join(f"{TITLES[each.metric]} {100 * share:.2f} %, " for share in each.gated)
        + f"SQNR {each.sqnr_db:.1f} dB"
        for name, each in quantized.tried.items()
    }
    other = next(name for name in figures if name != quantized.smooth)
    return Decision(quantized.smooth, f"{figures[quantized.smooth]}; {other} {figures[other]}")


def require(manifest: Manifest, quantized: Quantized | None) -> None:
    """Raise AccuracyError if quantisation costs more accuracy than the limit allows.

    The accuracy was evaluated on this machine, which may have VNNI. With 7-bit weights it must hold without VNNI too:
    no product may saturate, so that integer sums are exact on every CPU.
    """
    if quantized and quantized.saturating and manifest.plan["weight_bits"] == 7:
        raise AccuracyError(f"7-bit weights can saturate on CPUs without VNNI: {', '.join(quantized.saturating)}")
    accuracy = quantized.accuracy if quantized else None
    if quantized and accuracy and not accuracy.ok:
        limit = f"limit {accuracy.limit:g} points" if accuracy.drop is not None else f"at least {MIN_SQNR_DB:g} dB"
        bits = manifest.details["quantization"].get("weight_bits")
        why = f"\n{cpu_model()}: {bits['reason']}" if quantized.saturating and bits else ""
        raise AccuracyError(f"{manifest.precision} is not accurate enough ({limit}): {accuracy}{why}")
