"""Objects that a benchmark can time: the protocol Measurable, and its implementation for bundles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import sha256
from evm_deploy.bench.layers import measure_layers
from evm_deploy.bench.record import Settings
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.bundle.loaded import LoadedBundle, load
from evm_deploy.bundle.manifest import FILE, Manifest
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.plan import DEFAULTS
from evm_deploy.runtimes.base import Batch, Feeds

TOP = 5  # classes that an end-to-end inference returns
STAGES_RUNS, STAGES_SECONDS = 20, 1.0  # most predictions whose stages are timed, and no later than this
TORCH = "torch"


class Measurable(Protocol):
    """Model that is loaded in its runtime and ready to be timed. Leaving its `with` block closes it.

    batch: batch sizes that the model accepts.
    """

    batch: Batch

    def facts(self) -> dict[str, Any]:
        """Return the model's data for `Record.bundle`."""
        ...

    def runtime(self) -> dict[str, Any]:
        """Return the runtime's data for `Record.runtime`."""
        ...

    @property
    def runs_on(self) -> str:
        """Processor that runs the model, with its full name: `CPU: ..`, `GPU: NVIDIA A10`; empty if not known."""
        ...

    @property
    def milliseconds(self) -> Mapping[str, float]:
        """Device time of each part of the last run, in ms; empty if the runtime does not measure parts."""
        ...

    def inference(self, batch: int, timed: str) -> Callable[[], object]:
        """Return the function to time, on seeded images. timed: `model` (arrays to arrays) or `end-to-end`."""
        ...

    def stages(self) -> dict[str, float]:
        """Return the times of one image in ms for `Record.stages_ms`."""
        ...

    def layers(self, batch: int) -> dict[str, Any]:
        """Return the times by module for `Record.layers`."""
        ...

    def __enter__(self) -> Measurable: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class MeasuredBundle:
    """Bundle that is loaded in its target's own runtime.

    Raises ToolchainError if this machine does not have that runtime, or emulates the device: the latency of an emulator
    has no meaning.
    """

    def __init__(self, path: Path, settings: Settings, require_signature: str | None = None) -> None:
        self.model = load(
            path,
            threads=settings.threads,
            scan=settings.scan,
            streams=settings.streams,
            require_signature=require_signature,
            **dict(settings.own),
        )
        self.batch = self.model.manifest.batch
        require_runnable(self.model)

    def facts(self) -> dict[str, Any]:
        """Return the bundle's data for `Record.bundle`."""
        return bundle_facts(self.model.bundle)

    def runtime(self) -> dict[str, Any]:
        """Return package versions, scan form, instruction set and compute plan for `Record.runtime`."""
        return {
            "versions": dict(self.model.target.availability().versions),
            "scan": asdict(self.model.scan),
            "isa": self.model.isa,
            "plan": dict(self.model.compute_plan()),
            "nodes": dict(self.model.nodes),
        }

    @property
    def runs_on(self) -> str:
        """Processor that runs the model, with its full name; empty if the runtime does not tell."""
        return self.model.runs_on

    @property
    def milliseconds(self) -> Mapping[str, float]:
        """Device time of each part of the last run, in ms; empty if the runtime does not measure parts."""
        return self.model.milliseconds

    def inference(self, batch: int, timed: str) -> Callable[[], object]:
        """Return the function to time: a run on the self-test's inputs, or a prediction from its image file."""
        if timed == "end-to-end":
            images = [self.image] * batch
            return lambda: self.model.predict(images, top=TOP)
        feeds = examples(self.model, batch)
        return lambda: self.model.run(feeds)

    @property
    def image(self) -> Path:
        """Image file of the self-test."""
        return self.model.bundle.path / "selftest" / "picture.png"

    def stages(self) -> dict[str, float]:
        """Return medians of the stages of `predict` for `Record.stages_ms`; empty if the bundle gives no answers."""
        if not self.model.task.decode:
            return {}
        seen: list[dict[str, float]] = []
        end = time.perf_counter() + STAGES_SECONDS
        while len(seen) < 2 or (len(seen) < STAGES_RUNS and time.perf_counter() < end):
            self.model.predict(self.image, TOP)
            seen.append(dict(self.model.spent_ms))
        return {stage: round(statistics.median(each[stage] for each in seen[1:]), 5) for stage in seen[0]}

    def layers(self, batch: int) -> dict[str, Any]:
        """Return the times by module for `Record.layers`; empty if the runtime has no profiler."""
        return measure_layers(self.model, examples(self.model, batch))

    def __enter__(self) -> MeasuredBundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.__exit__(kind, error, trace)


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Return name, target, precision, calibration, input size, hash, artifact size and accuracy for `Record.bundle`."""
    manifest = bundle.manifest
    return {
        "name": bundle.path.resolve().name,
        "model": manifest.model["name"],
        "target": manifest.target,
        "precision": manifest.precision,
        "calibration": calibration_text(manifest),
        "imgsz": manifest.plan["imgsz"],
        "manifest_sha256": sha256(bundle.path / FILE),
        "artifact_bytes": bundle.size_bytes,
        "accuracy": manifest.accuracy,
    }


def calibration_text(manifest: Manifest) -> str:
    """Format how an int8 bundle was calibrated: `minmax, smooth off`; empty for the defaults."""
    given = {name: manifest.plan.get(name, DEFAULTS[name]) for name in ("calib_method", "smooth")}
    said = {"calib_method": str(given["calib_method"]), "smooth": f"smooth {given['smooth']}"}
    return ", ".join(said[name] for name, value in given.items() if value != DEFAULTS[name])


def require_runnable(model: LoadedBundle) -> None:
    """Raise ToolchainError if this machine does not have the runtime of the model's target, or emulates its device."""
    here = model.target.availability()
    if model.emulates:
        raise ToolchainError(
            f"the latency of target '{model.target.name}' cannot be measured here: {model.emulates}",
            "measure on the device:  evm-bench BUNDLE --host user@device",
        )
    if not here.can_run:
        raise ToolchainError(f"the latency of target '{model.target.name}' cannot be measured here", here.hint)


def examples(model: LoadedBundle, batch: int) -> Feeds:
    """Return the inputs of the bundle's self-test, repeated or cut to `batch` images."""
    from safetensors.numpy import load_file

    (name,) = model.inputs
    test_inputs = load_file(model.bundle.path / "selftest" / "probes.safetensors")[model.manifest.plan["input"]]
    return {name: repeated(test_inputs, batch)}


def repeated(test_inputs: NDArray[Any], batch: int) -> NDArray[Any]:
    """Return a new array of `batch` images, taken from `test_inputs` (n, ...) in order and repeated as needed."""
    return np.resize(test_inputs, (batch, *test_inputs.shape[1:])).copy()


def batch_size(batch: Batch, asked: int | None) -> int:
    """Return the batch size to measure: `asked`, or the smallest. Raises UsageError if `batch` does not allow it."""
    size = batch.min if asked is None else asked
    if size < batch.min or (batch.max is not None and size > batch.max):
        raise UsageError(
            f"--batch {size}: the bundle was exported with --batch {batch}", "export it again with another --batch"
        )
    return size
