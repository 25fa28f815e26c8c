"""`Runtime`: the interface of all runtimes, with its data types and shared checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import BundleError, UsageError

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """Images per inference: a fixed number if min == max, else any number from min to max. max None: no upper bound."""

    min: int
    opt: int
    max: int | None

    @property
    def static(self) -> bool:
        """True if the number of images is fixed."""
        return self.min == self.max

    @classmethod
    def parse(cls, text: str | int) -> Batch:
        """Parse the value of --batch: `4`, `dynamic`, or `min:opt:max`. Raises UsageError."""
        if str(text) == "dynamic":
            return cls(1, 1, None)
        parts = str(text).split(":")
        if len(parts) in (1, 3) and all(re.fullmatch(r"[0-9]{1,5}", part) for part in parts):
            low, opt, high = (int(part) for part in (parts * 3)[:3])
            if 1 <= low <= opt <= high:
                return cls(low, opt, high)
        raise UsageError(f"--batch {text!r}: use a number from 1, 'dynamic', or min:opt:max such as 1:4:8")

    def __str__(self) -> str:
        if self.static:
            return str(self.min)
        return f"{self.min}:{self.opt}:{self.max}" if self.max else "dynamic"


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of an input or output. None in the shape is the dynamic batch."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('batch' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class RunOptions:
    """Options for opening an artifact. None means the default of the runtime.

    threads: threads per inference. plugin: native library that runs the scans; None for portable scans. function: name
    of a function, for artifacts with several functions. streams: number of simultaneous inferences. profile: measure
    the time of each node. settings: instance of `RuntimeInfo.settings`. identity: unique text of this artifact, for
    runtimes that cache compiled models.
    """

    threads: int | None = None
    plugin: Path | None = None
    function: str | None = None
    streams: int = 1
    profile: bool = False
    settings: Any = None
    identity: str = ""


DEFAULTS = RunOptions()


@dataclass(frozen=True)
class NodeTime:
    """Time of one node in one inference.

    name, op: names that the runtime gives to the node and its type. inside: number of profiler events inside the node,
    such as those of a loop's body. The time to record these events is part of `ms`.
    """

    name: str
    op: str
    ms: float
    inside: int = 0


class Runtime(Protocol):
    """Loaded artifact. Leaving its `with` block closes the artifact. Returned arrays belong to the caller."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference: input arrays by name -> output arrays by name. The caller has called `check_feeds`."""
        ...


class Profiled(Runtime, Protocol):
    """Runtime that was opened with RunOptions.profile."""

    def node_times(self) -> list[NodeTime]:
        """Return the time of each node, in order of execution. Call this method only once.

        The times are means over all inferences so far, or those of the fastest inference (`Profiler.records`).
        """
        ...


def check_feeds(inputs: Mapping[str, TensorSpec], feeds: Feeds) -> None:
    """Check names, dtypes and shapes of `feeds` against `inputs`. Raises UsageError with expected and given values."""
    if set(feeds) != set(inputs):
        raise UsageError(f"inputs are {', '.join(map(str, inputs.values()))}; got {', '.join(sorted(feeds)) or 'none'}")
    for name, spec in inputs.items():
        value = feeds[name]
        if not isinstance(value, np.ndarray):
            raise UsageError(f"input {spec}: expected a numpy array, got {type(value).__name__}")
        fits = value.ndim == len(spec.shape) and all(
            have >= 1 if want is None else have == want for have, want in zip(value.shape, spec.shape, strict=True)
        )
        if str(value.dtype) != spec.dtype or not fits:
            raise UsageError(f"input {spec}: got {value.dtype}{list(value.shape)}")


def run_batched(runtime: Runtime, batch: Batch, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Run any number of inputs through a runtime in batches. Returns the outputs by name, first axis as in `inputs`.

    If the last batch is too small, its last input is repeated, and the surplus outputs are dropped. Raises BundleError
    if the number of outputs differs from the number of inputs, or if output sizes change between batches.
    """
    size = batch.min if batch.static else batch.max or len(inputs)
    (name,) = runtime.inputs
    parts: list[dict[str, NDArray[Any]]] = []
    for start in range(0, len(inputs), size):
        chunk = inputs[start : start + size]
        least = batch.min
        fill = np.repeat(chunk[-1:], max(0, least - len(chunk)), axis=0)
        feeds = {name: np.concatenate([chunk, fill])}
        check_feeds(runtime.inputs, feeds)
        outputs = runtime.run(feeds)
        for output, value in outputs.items():
            like = parts[0][output] if parts else value
            if value.shape != (len(feeds[name]), *like.shape[1:]):
                gives, fed = (TensorSpec(k, str(v.dtype), v.shape) for k, v in ((output, value), (name, feeds[name])))
                raise BundleError(f"the model gives {gives} for {fed}", "export it again")
        parts.append({name: value[: len(chunk)] for name, value in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
