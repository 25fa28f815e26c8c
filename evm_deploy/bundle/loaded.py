"""`load`: open a bundle for inference. Needs the runtime of the bundle's target, numpy and Pillow, but not torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.cores import check_threads
from evm_deploy._util.files import sha256
from evm_deploy._util.text import command
from evm_deploy._util.values import path_text, text, whole
from evm_deploy.bundle import selftest
from evm_deploy.bundle.bundle import Bundle, open_bundle
from evm_deploy.bundle.given import Stopwatch, each_image, stacked_pixels
from evm_deploy.bundle.lowering import lowering_here
from evm_deploy.bundle.manifest import FILE as MANIFEST
from evm_deploy.bundle.signing import public_key
from evm_deploy.data.geometry import Geometry
from evm_deploy.data.reading import read_image
from evm_deploy.errors import BundleError, ImageError, UsageError
from evm_deploy.runtimes.base import (
    DEFAULTS,
    Feeds,
    Profiled,
    RunOptions,
    Runtime,
    TensorSpec,
    check_feeds,
    run_batched,
)
from evm_deploy.runtimes.registry import configured, runtime_of
from evm_deploy.tasks import get_task
from evm_deploy.tasks.task import Decode, Prediction, Reading

if TYPE_CHECKING:
    from evm_deploy.data.reading import ImageLike

OnError = Callable[[int, ImageError], object]
NO_SETTINGS: Mapping[str, Any] = {}
STAGES = ("preprocess", "inference", "postprocess")
DYNAMIC_BATCH = 16  # images per inference of predict() if the batch of the bundle is unbounded


class LoadedBundle:
    """Opened bundle: `run` takes arrays, `predict` takes images, `selftest` checks this device. Implements Runtime.

    bundle: result of `open_bundle`. options, scan, settings: as in `load`. Raises the errors of `load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: RunOptions = DEFAULTS,
        scan: str = "auto",
        settings: Mapping[str, Any] = NO_SETTINGS,
    ) -> None:
        self._closed = False
        self._stopwatch = Stopwatch(STAGES)
        self.bundle, self.manifest = bundle, bundle.manifest
        self.target = runtime_of(self.manifest.target, bundle.path)
        if not self.manifest.built:
            raise BundleError(
                f"bundle {bundle.path} has no engine yet",
                f"on the device:  {command('evm-export', '--finish', bundle.path)}",
                code="bundle.unfinished",
            )
        own = configured(self.target, settings)
        if options.streams > 1 and not self.target.streams:
            raise UsageError(f"target '{self.target.name}' runs only one inference at a time", "leave --streams out")
        self.preprocessing = self.manifest.preprocess()
        self.task = get_task(self.manifest.task)
        self.labels = self._read_labels()
        self.plugin, self.scan = lowering_here(bundle, self.target, scan, own)
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
        """Run one inference on arrays with the names, dtypes and shapes of `inputs`. Returns the outputs by name.

        Raises UsageError naming the input that does not fit.
        """
        runtime = self._opened()
        check_feeds(self.inputs, feeds)
        return runtime.run(feeds)

    @property
    def spent_ms(self) -> Mapping[str, float]:
        """Time of the stages of the last `predict` in ms, in all: preprocess, inference and postprocess."""
        return self._stopwatch.spent_ms

    @property
    def milliseconds(self) -> Mapping[str, float]:
        """Device time of the last run in ms, by part (inputs, compute, outputs); empty if the runtime has no timer."""
        return getattr(self._runtime, "milliseconds", {})

    @property
    def runs_on(self) -> str:
        """Processor that runs the model, with its full name: `GPU: NVIDIA A10`; empty if the runtime does not tell."""
        return str(getattr(self._runtime, "runs_on", ""))

    @property
    def nodes(self) -> Mapping[str, int]:
        """Number of nodes by the execution provider that runs them; empty unless providers were asked for."""
        return getattr(self._runtime, "nodes", {})

    @property
    def emulates(self) -> str:
        """The reason why this machine computes the model without its device, so that times mean nothing; else empty."""
        return str(getattr(self._runtime, "emulates", ""))

    @property
    def isa(self) -> str | None:
        """Instruction set of the native kernels that run the scans, such as avx2; None for other scans."""
        return self.target.kernels.isa(self.plugin) if self.plugin and self.target.kernels else None

    def compute_plan(self) -> Mapping[str, Any]:
        """Return the number of operations and the estimated cost per device. Only Core ML reports them."""
        return getattr(self._opened(), "compute_plan", dict)()

    def profiled(self) -> Profiled | None:
        """Open the artifact a second time, in a runtime that measures each node.

        None if the target has no profiler, or the runtime makes one node of many.
        """
        opened = self._opened()  # a zip's folder is gone with it
        if not self.target.profiler or getattr(opened, "fuses", False):
            return None
        options = replace(self._options, streams=1, profile=True)
        return cast("Profiled", self.target.open(self.bundle.path / self.manifest.artifact, options))

    def predict(
        self, images: ImageLike | Iterable[ImageLike], top: int = 5, *, on_error: OnError | None = None
    ) -> list[Sequence[Prediction]]:
        """Return the `top` most probable classes of each image, or the detections in it (`Detection`), best first.

        A segmenter gives each image a `LabelMap`: a sequence of the classes that are present, with the class of every
        pixel in `map`. Boxes, masks and maps are in pixels of the upright image. `spent_ms` has the times of the call.
        images: any number of images as `data.reading.read_image` takes them (paths, encoded bytes, open files,
        Pillow images, uint8 arrays), or uint8 [n, H, W, C] or [n, H, W]. One image alone: the list has one answer.
        on_error: called with the index and the ImageError of an image that cannot be read, whose answer is then [];
        None raises the error. Raises UsageError if the bundle gives no predictions, or is closed, BundleError for
        outputs that are NaN, infinite or of a wrong shape.
        """
        self._require_answers(top)
        self._stopwatch = Stopwatch(STAGES)
        results: list[Sequence[Prediction]] = []
        waiting: dict[int, tuple[NDArray[np.uint8], Geometry | None]] = {}

        def classify() -> None:
            if waiting:
                pixels, places = zip(*waiting.values(), strict=True)
                for index, answer in zip(waiting, self._predictions(np.stack(pixels), top, places), strict=True):
                    results[index] = answer
                waiting.clear()

        for index, image in enumerate(each_image(images)):
            results.append([])
            try:
                with self._stopwatch("preprocess"):
                    waiting[index] = self._placed(image)
            except ImageError as error:
                if on_error is None and isinstance(image, (str, os.PathLike)):
                    raise  # names the file
                if on_error is None:
                    raise ImageError(f"images[{index}]: {error.args[0]}", error.hint, code=error.code) from error
                on_error(index, error)
            if len(waiting) == self._batch_size:
                classify()
        classify()
        return results

    def classify(
        self, pixels: NDArray[np.uint8] | Iterable[NDArray[np.uint8]], top: int = 5
    ) -> list[Sequence[Prediction]]:
        """Return the `top` most probable classes of images that `preprocessing.pixels` has preprocessed.

        pixels: uint8 [n, H, W, C] with any n, independent of the bundle's batch, or a list of [H, W, C]. An app can
        preprocess in other threads and call `classify` here. Raises UsageError, BundleError.
        """
        self._require_answers(top)
        array = stacked_pixels(pixels, (*self.preprocessing.size, self.preprocessing.channels))
        starts = range(0, len(array), self._batch_size)
        size = self.preprocessing.size
        places = [Geometry(size, size, size, (0, 0))] * self._batch_size  # boxes and masks in network pixels
        return [found for at in starts for found in self._predictions(array[at : at + self._batch_size], top, places)]

    def _placed(self, image: ImageLike) -> tuple[NDArray[np.uint8], Geometry | None]:
        """Return the pixels of an image, and its place in the network's input if the task maps outputs back to it."""
        if not self.task.selects:
            return self.preprocessing.pixels(image), None
        upright = read_image(image, self.preprocessing.channels)
        return self.preprocessing.pixels(upright), self.preprocessing.geometry(*upright.size)

    def _predictions(
        self, pixels: NDArray[np.uint8], top: int, places: Sequence[Geometry | None] = ()
    ) -> Sequence[Sequence[Prediction]]:
        """Return the predictions of at most a batch of images. Without places, they are in network pixels."""
        decode = self._require_answers(top)
        with self._stopwatch("inference"):
            outputs = self._answers(pixels)
        known = [place for place in places if place]
        reading = Reading(
            self.labels, whole("top", top), known or None, self.manifest.selection, palette=self.manifest.palette
        )
        with self._stopwatch("postprocess"):
            return decode(outputs, reading)

    def selftest(self) -> list[selftest.Check]:
        """Compare preprocessing, outputs and scans with the expected values in the bundle. Raises BundleError."""
        return selftest.run(self.bundle, self.target, self._opened(), replace(self._options, threads=None))

    def _opened(self) -> Runtime:
        """Return the runtime. Raises UsageError after the end of the `with` block and after `close`."""
        if self._closed:
            raise UsageError(
                f"bundle {self.bundle.path} is closed: its `with` block has ended, or close() was called",
                "call inside the block, or load it again",
            )
        return self._runtime

    @property
    def _batch_size(self) -> int:
        return self.manifest.batch.max or DYNAMIC_BATCH

    def _require_answers(self, top: int) -> Decode:
        """Return the task's `decode`. Raises UsageError for a task without predictions, and for an invalid `top`."""
        self._opened()
        if not self.task.decode:
            raise UsageError(f"no classes to predict: the bundle gives {self.task.gives}", "use run(feeds)")
        at_least_one("top", top)
        return self.task.decode

    def _answers(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return the outputs for preprocessed images. Raises BundleError if a value or a shape is invalid."""
        value = pixels if self.manifest.input == "image" else self.preprocessing.normalise(pixels)
        outputs = run_batched(self, self.manifest.batch, value)
        self._check_task({name: replace(self.outputs[name], shape=each.shape) for name, each in outputs.items()})
        if not all(np.isfinite(each).all() for each in outputs.values()):
            raise BundleError(
                f"bundle {self.bundle.path}: the network gives NaN or Inf on this device",
                f"run the self-test:  {command('evm-run', self.bundle.path, '--selftest')}",
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
        """Check that the inputs and outputs of the artifact match the manifest. Raises BundleError.

        Hashes only prove that each file is intact, not that artifact and manifest belong together.
        """
        have, want = (*self.inputs.values(), *self.outputs.values()), (*self.manifest.inputs, *self.manifest.outputs)
        described = [TensorSpec(each["name"], each["dtype"], tuple(each["shape"])) for each in want]
        if len(have) != len(described) or not all(map(_alike, have, described)):
            raise self._unlike(", ".join(map(str, have)), f"the manifest says {', '.join(map(str, described))}")
        if len(self.inputs) != 1:
            raise self._unlike(", ".join(map(str, have)), "a bundle's model has one input")
        self._check_task(self.outputs)

    def _check_task(self, outputs: Mapping[str, TensorSpec]) -> None:
        """Raise BundleError unless the outputs fit the task."""
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
        self._opened()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed:
            self._closed = True
            self._runtime.__exit__(kind, error, trace)

    def close(self) -> None:
        """Close the runtime, as the end of a `with` block does; closing it again is no error."""
        self.__exit__(None, None, None)


def _alike(have: TensorSpec, want: TensorSpec) -> bool:
    """Test whether two specs are equal, ignoring axes whose size is unknown in one of the specs."""
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
    """Open a bundle (folder or zip) for inference, after checking the SHA-256 of every file.

    threads: threads per inference; None for the default of the runtime.
    scan: `plugin` (installed native library), `bundled` (native library inside the bundle: use it only for bundles that
    you trust, because a library is a program), `portable`, or `auto` (the installed library if there is one, else
    portable). The attribute `scan` of the result has the decision and its reason.
    streams: number of threads that will call `run` at the same time. With OpenVINO, each stream has its own `threads`;
    with ONNX Runtime, all streams share them.
    require_signature: PEM file of the ed25519 public key that must have signed the bundle.
    settings: settings of the bundle's runtime (`RuntimeInfo.settings`). OpenVINO: `device`, such as GPU or
    HETERO:GPU,CPU (None: CPU); `cache`, a folder for compiled models, which makes the next load faster. TensorRT:
    `cuda_graph`, to launch the engine as one CUDA graph. ONNX Runtime: `providers`, execution providers in order of
    preference, such as ["openvino"] or ["cuda", "cpu"], and `provider_options` of the first one. A model that they
    cannot run as a whole is an error unless the last is "cpu"; the attribute `nodes` has the nodes that each one runs.

    Raises BundleError for an invalid bundle, ToolchainError for a missing runtime or native library, UsageError for
    invalid options.
    """
    options = RunOptions(
        None if threads is None else at_least_one("threads", threads), streams=at_least_one("streams", streams)
    )
    check_threads(options.threads, options.streams)
    scan = text("scan", scan)
    key = None if require_signature is None else public_key(path_text("require_signature", require_signature))
    return LoadedBundle(open_bundle(path_text("path of the bundle", path), key), options, scan, settings)


def at_least_one(what: str, value: Any) -> int:
    """Return a whole number from 1. Raises UsageError for other values."""
    found = whole(what, value)
    if found < 1:
        raise UsageError(f"{what} is {found}, it must be a whole number from 1")
    return found
