"""What every runtime is, and the checks that all of them share."""

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
    """Images per inference: static when min == max, else any number between; `max` None is unbounded."""

    min: int
    opt: int
    max: int | None

    @property
    def static(self) -> bool:
        return self.min == self.max

    @classmethod
    def parse(cls, text: str | int) -> Batch:
        """`4`, `dynamic`, or `min:opt:max`."""
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
    """Name, numpy dtype name and shape of an input or output; None is the dynamic batch."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('batch' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class RunOptions:
    """How to run an artifact. None: as the runtime does by itself.

    threads: of one inference. plugin: the native library to run scans on; None runs them portably. function: of an
    artifact that has several. streams: inferences at the same time that it is opened for. profile: count what each node
    takes. settings: the runtime's own, `RuntimeInfo.settings`. identity: what tells this artifact from others, for
    runtimes that keep compiled models.
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
    """What one node takes in one inference. name, op: as the runtime calls them. inside: events in it, such as those of
    a loop's body, whose recording is part of `ms`.
    """

    name: str
    op: str
    ms: float
    inside: int = 0


class Runtime(Protocol):
    """A loaded artifact, closed by leaving its `with` block. Returned arrays belong to the caller."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """One inference. Feeds have been checked by `check_feeds`."""
        ...


class Profiled(Runtime, Protocol):
    """A runtime that was opened with RunOptions.profile."""

    def node_times(self) -> list[NodeTime]:
        """Of the inferences so far, means or the fastest, nodes in the order in which they ran. To be asked once."""
        ...


def check_feeds(inputs: Mapping[str, TensorSpec], feeds: Feeds) -> None:
    """Names, dtypes and shapes of `feeds` against `inputs`. Raises UsageError naming the input and both sides."""
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
    """Run any number of inputs through a runtime whose batch may be static: the last batch is filled up and cut.

    Raises BundleError for a model that gives not as many outputs as it had inputs, or now these and now other sizes.
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
