"""What is measured: a bundle, or the float network of a checkpoint in torch, which comparisons are made with."""

from __future__ import annotations

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
from evm_deploy.bundle.manifest import FILE
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.runtimes.base import Batch, Feeds

TOP = 5  # classes, end to end
TORCH = "torch"


class Measurable(Protocol):
    """Opened, with its runtime loaded; closed by leaving its `with` block.

    facts, runtime: as the Record has them. batch: what it takes. milliseconds: parts of the last run on the device.
    """

    batch: Batch

    def facts(self) -> dict[str, Any]: ...

    def runtime(self) -> dict[str, Any]: ...

    @property
    def milliseconds(self) -> Mapping[str, float]: ...

    def inference(self, batch: int, timed: str) -> Callable[[], object]:
        """The function to time, on seeded images: from arrays to arrays, or end to end."""
        ...

    def layers(self, batch: int) -> dict[str, Any]:
        """As the Record has them."""
        ...

    def __enter__(self) -> Measurable: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class MeasuredBundle:
    """A bundle. Raises ToolchainError where its own runtime is not on this machine: an emulator has no latency."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.model = load(
            path,
            threads=settings.threads,
            scan=settings.scan,
            streams=settings.streams,
            **dict(settings.own),
        )
        self.batch = self.model.manifest.batch
        require_runnable(self.model)

    def facts(self) -> dict[str, Any]:
        return bundle_facts(self.model.bundle)

    def runtime(self) -> dict[str, Any]:
        return {
            "versions": dict(self.model.target.availability().versions),
            "scan": asdict(self.model.scan),
            "plan": dict(self.model.compute_plan()),
        }

    @property
    def milliseconds(self) -> Mapping[str, float]:
        return self.model.milliseconds

    def inference(self, batch: int, timed: str) -> Callable[[], object]:
        if timed == "end-to-end":
            images = [self.model.bundle.path / "selftest" / "picture.png"] * batch
            return lambda: self.model.predict(images, top=TOP)
        feeds = examples(self.model, batch)
        return lambda: self.model.run(feeds)

    def layers(self, batch: int) -> dict[str, Any]:
        return measure_layers(self.model, examples(self.model, batch))

    def __enter__(self) -> MeasuredBundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.__exit__(kind, error, trace)


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """As the Record has them."""
    manifest = bundle.manifest
    return {
        "name": bundle.path.resolve().name,
        "model": manifest.model["name"],
        "target": manifest.target,
        "precision": manifest.precision,
        "imgsz": manifest.plan["imgsz"],
        "manifest_sha256": sha256(bundle.path / FILE),
        "artifact_bytes": bundle.size_bytes,
        "accuracy": manifest.accuracy,
    }


def require_runnable(model: LoadedBundle) -> None:
    """Raise ToolchainError where the target's own runtime is not on this machine."""
    here = model.target.availability()
    if not here.can_run:
        raise ToolchainError(f"the latency of target '{model.target.name}' cannot be measured here", here.hint)


def examples(model: LoadedBundle, batch: int) -> Feeds:
    """The self-test's inputs, as many images of them."""
    from safetensors.numpy import load_file

    (name,) = model.inputs
    test_inputs = load_file(model.bundle.path / "selftest" / "probes.safetensors")[model.manifest.plan["input"]]
    return {name: repeated(test_inputs, batch)}


def repeated(test_inputs: NDArray[Any], batch: int) -> NDArray[Any]:
    """As many of the test_inputs as a batch takes, one after the other."""
    return np.resize(test_inputs, (batch, *test_inputs.shape[1:])).copy()


def batch_size(batch: Batch, asked: int | None) -> int:
    """Raises UsageError for a batch that the bundle does not take."""
    size = batch.min if asked is None else asked
    if size < batch.min or (batch.max is not None and size > batch.max):
        raise UsageError(f"--batch {size}: this bundle was exported with --batch {batch}", "export it with another")
    return size
