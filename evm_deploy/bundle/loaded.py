"""load(): a bundle as an app uses it. Needs the bundle's runtime, numpy and Pillow; never torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import sha256
from evm_deploy._util.text import one_of
from evm_deploy.bundle import selftest
from evm_deploy.bundle.bundle import Bundle, open_bundle
from evm_deploy.bundle.manifest import FILE as MANIFEST
from evm_deploy.bundle.manifest import Decision
from evm_deploy.bundle.signing import public_key
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.runtimes.base import DEFAULTS, Feeds, Profiled, RunOptions, TensorSpec, check_feeds, run_batched
from evm_deploy.runtimes.info import NativeKernels
from evm_deploy.runtimes.registry import configured, runtime_of
from evm_deploy.tasks import get_task
from evm_deploy.tasks.task import Decode, Prediction
from evm_deploy.toolchain.platforms import host_platform

if TYPE_CHECKING:
    from PIL.Image import Image

NO_SETTINGS: Mapping[str, Any] = {}
DYNAMIC_BATCH = 16  # images per inference of predict(), where the bundle leaves the batch open


class LoadedBundle:
    """An opened bundle: `run` on arrays, `predict` on images, `selftest` on this device. A Runtime itself."""

    def __init__(
        self,
        bundle: Bundle,
        options: RunOptions = DEFAULTS,
        scan: str = "auto",
        settings: Mapping[str, Any] = NO_SETTINGS,
    ) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.target = runtime_of(self.manifest.target, bundle.path)
        if not self.manifest.built:
            raise BundleError(
                f"bundle {bundle.path} has no engine yet",
                f"on the device:  evm-export --finish {bundle.path}",
                code="bundle.unfinished",
            )
        own = configured(self.target, settings)
        if options.streams > 1 and not self.target.streams:
            raise UsageError(f"target '{self.target.name}' runs one inference at a time", "leave --streams out")
        self.preprocessing = self.manifest.preprocess()
        self.task = get_task(self.manifest.task)
        self.labels = self._read_labels()
        self.plugin, self.scan = self._lowering(scan)
        identity = sha256(bundle.path / MANIFEST)[:16]
        self._options = replace(options, plugin=self.plugin, settings=own, identity=identity)
        self._runtime = self.target.open(bundle.path / self.manifest.artifact, self._options)
        self.inputs: Mapping[str, TensorSpec] = self._runtime.inputs
        self.outputs: Mapping[str, TensorSpec] = self._runtime.outputs
        try:
            self._check_interface()
        except BundleError:
            self._runtime.__exit__(None, None, None)
            raise

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """One inference on arrays named and shaped as `inputs`. Raises UsageError naming what does not fit."""
        check_feeds(self.inputs, feeds)
        return self._runtime.run(feeds)

    @property
    def milliseconds(self) -> Mapping[str, float]:
        """Milliseconds of the last run on the device, by part, where the runtime tells them."""
        return getattr(self._runtime, "milliseconds", {})

    def compute_plan(self) -> Mapping[str, Any]:
        """The device that each part of the model runs on, where the runtime tells it."""
        return getattr(self._runtime, "compute_plan", dict)()

    def profiled(self) -> Profiled | None:
        """The artifact once more, in a runtime that counts what its nodes take; None where there is no such."""
        if not self.target.profiler:
            return None
        options = replace(self._options, streams=1, profile=True)
        return cast("Profiled", self.target.open(self.bundle.path / self.manifest.artifact, options))

    def predict(self, images: Iterable[str | Path | Image | NDArray[np.uint8]], top: int = 5) -> list[list[Prediction]]:
        """The `top` most probable classes of each image (path, Pillow image or uint8 RGB array), best first.

        Raises ImageError for an image that cannot be read, UsageError for a bundle without a classifier.
        """
        self._require_answers(top)
        pixels = map(self.preprocessing.pixels, images)
        results: list[list[Prediction]] = []
        while chunk := list(itertools.islice(pixels, self._batch_size)):
            results += self.classify(np.stack(chunk), top)
        return results

    def classify(self, pixels: NDArray[np.uint8], top: int = 5) -> list[list[Prediction]]:
        """`predict` of images that `preprocessing.pixels` has made ready, in other threads perhaps: (n, H, W, 3)
        uint8, n from 1, whatever the bundle's batch. Raises UsageError.
        """
        decode = self._require_answers(top)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (*self.preprocessing.size, 3):
            height, width = self.preprocessing.size
            raise UsageError(f"pixels must be uint8 [n, {height}, {width}, 3], got {pixels.dtype} {list(pixels.shape)}")
        chunks = (pixels[start : start + self._batch_size] for start in range(0, len(pixels), self._batch_size))
        return [found for chunk in chunks for found in decode(self._answers(chunk), self.labels, top)]

    def selftest(self) -> list[selftest.Check]:
        """Preprocessing, outputs and scans against the expected values in the bundle."""
        return selftest.run(self.bundle, self.target, self._runtime, replace(self._options, threads=None))

    def _lowering(self, scan: str) -> tuple[Path | None, Decision]:
        """How this bundle's scans run here, and why."""
        one_of("scan", scan, ("auto", "plugin", "bundled", "portable"))
        modes = self.manifest.scan["value"].split("+")
        if scan == "portable" and "portable" not in modes:
            raise UsageError("this bundle's model has its scans as native nodes only", "export it with --scan portable")
        if "aot" in modes:
            return None, Decision("aot", "the kernel is inside the engine")
        if scan == "portable" or "plugin" not in modes:
            if scan in ("plugin", "bundled"):
                raise UsageError(
                    "this bundle was exported with portable scans: it has no node for a native kernel",
                    "export it with --scan auto",
                )
            return None, Decision("portable", "as asked" if scan == "portable" else "the bundle was exported so")
        plugins, host = self.manifest.plugins, host_platform()
        if scan == "bundled":
            if host not in plugins:
                raise UsageError(
                    f"this bundle has no native library for {host}; it has: {', '.join(plugins) or 'none'}",
                    "export it with --platform",
                )
            own = self.bundle.path / plugins[host]
            return own, Decision("plugin", f"native kernel, {self._kernels.isa(own)}, from the bundle ({host})")
        try:
            plugin = self._kernels.installed()
        except ToolchainError as error:
            reason = error.args[0]
            if host in plugins:  # a library is a program: it runs only for who says so
                reason += "; the bundle brings one for this platform, which scan 'bundled' trusts"
            elif plugins:
                reason += f"; the bundle's is for {', '.join(plugins)}, this is {host}"
            if scan == "plugin" or "portable" not in modes:
                raise ToolchainError(reason, error.hint) from error
            return None, Decision("portable", reason)
        return plugin, Decision("plugin", f"native kernel, {self._kernels.isa(plugin)}, installed")

    @property
    def _kernels(self) -> NativeKernels:
        if not self.target.kernels:
            raise BundleError(
                f"bundle {self.bundle.path} has scans for a native kernel: target {self.target.name!r} has none",
                "export it again",
            )
        return self.target.kernels

    @property
    def _batch_size(self) -> int:
        return self.manifest.batch.max or DYNAMIC_BATCH

    def _require_answers(self, top: int) -> Decode:
        """How outputs become predictions. Raises UsageError for a task that has none, and for an impossible `top`."""
        if not self.task.decode:
            raise UsageError(f"this bundle gives {self.task.gives}, not classes", "use run(feeds)")
        if top < 1:
            raise UsageError(f"top is {top}, it must be at least 1")
        return self.task.decode

    def _answers(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The outputs for prepared images, finite and of the shapes that the task takes. Raises BundleError."""
        value = pixels if self.manifest.input == "image" else self.preprocessing.normalise(pixels)
        outputs = run_batched(self, self.manifest.batch, value)
        self._check_task({name: replace(self.outputs[name], shape=each.shape) for name, each in outputs.items()})
        if not all(np.isfinite(each).all() for each in outputs.values()):
            raise BundleError(
                f"bundle {self.bundle.path}: the network gives NaN or Inf here",
                f"does it compute right on this device?  evm-run {self.bundle.path} --selftest",
            )
        return outputs

    def _read_labels(self) -> list[str] | None:
        file = self.bundle.path / "labels.txt"
        if "labels.txt" not in self.manifest.files:
            return None
        try:
            return file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            message = f"bundle {self.bundle.path}: labels.txt is not UTF-8 text"
            raise BundleError(message, "export it again", code="file.damaged", where="labels.txt") from error

    def _check_interface(self) -> None:
        """The artifact against its manifest: hashes say that both are whole, not that they belong together."""
        have, want = (*self.inputs.values(), *self.outputs.values()), (*self.manifest.inputs, *self.manifest.outputs)
        described = [TensorSpec(each["name"], each["dtype"], tuple(each["shape"])) for each in want]
        if len(have) != len(described) or not all(map(_alike, have, described)):
            raise self._unlike(", ".join(map(str, have)), f"the manifest says {', '.join(map(str, described))}")
        if len(self.inputs) != 1:
            raise self._unlike(", ".join(map(str, have)), "a bundle's model has one input")
        self._check_task(self.outputs)

    def _check_task(self, outputs: Mapping[str, TensorSpec]) -> None:
        """Raise BundleError for outputs that are none of the task's."""
        wrong = self.task.check(outputs, self.labels) if self.task.check else None
        if wrong:
            raise self._unlike(*wrong)

    def _unlike(self, have: str, want: str) -> BundleError:
        message, artifact = (
            f"bundle {self.bundle.path}: {self.manifest.artifact} has {have}; {want}",
            self.manifest.artifact,
        )
        return BundleError(message, "export it again", code="model.interface", where=artifact)

    def __enter__(self) -> LoadedBundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runtime.__exit__(kind, error, trace)


def _alike(have: TensorSpec, want: TensorSpec) -> bool:
    """Whether they are the same, but for sizes that one of them does not tell."""
    sizes = zip(have.shape, want.shape, strict=False)
    same = (have.name, have.dtype, len(have.shape)) == (want.name, want.dtype, len(want.shape))
    return same and all(None in pair or pair[0] == pair[1] for pair in sizes)


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    scan: str = "auto",
    streams: int = 1,
    require_signature: str | Path | None = None,
    **settings: Any,
) -> LoadedBundle:
    """Open a bundle, every hash checked. Raises BundleError; ToolchainError for a native library that does not load.

    `threads`: intra-op threads, None for the runtime's default. `scan`: `plugin` (the installed native kernel),
    `bundled` (the native library that the bundle brings, which is a program: only for bundles that you trust),
    `portable`, or `auto`, the installed kernel where there is one. `.scan` of the result says which and why.
    `streams`: how many threads will call `run` at the same time, each with `threads` of its own in OpenVINO, all with
    the same in ONNX Runtime. `require_signature`: the PEM file of the ed25519 public key that must have signed the
    bundle. `settings`: those of the bundle's runtime (`RuntimeInfo.settings`). OpenVINO: `device`, such as GPU or
    HETERO:GPU,CPU, None for the CPU; `cache`, a folder for compiled models, which load sooner the next time. TensorRT:
    `cuda_graph`, launch the engine as one CUDA graph.
    """
    bundle = open_bundle(path, public_key(require_signature) if require_signature else None)
    return LoadedBundle(bundle, RunOptions(threads, streams=streams), scan, settings)
