"""Access to the scans of a TFLite file: taps on its tensors, and single scans cut out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.export.litert import flatbuffer
from evm_deploy.export.litert.layout import permuted
from evm_deploy.export.litert.rounding import in_float
from evm_deploy.export.target import Artifact
from evm_deploy.runtimes.base import Feeds
from evm_deploy.runtimes.litert import LiteRt

if TYPE_CHECKING:
    from evm_deploy.export.hub.graph import ScanSite
    from evm_deploy.export.litert.translate import Value

VARIABLE = ("u", "delta", "B", "C")  # inputs of a scan that are not constant


@dataclass(frozen=True)
class LiteRtArtifact(Artifact):
    """TFLite file, and where the values of the ONNX graph are in it. layers: node name -> name of its output."""

    values: Mapping[str, Value] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)


class LiteRtScanAccess:
    """Per-scan access to a TFLite file, by parts of the file itself."""

    def __init__(self, artifact: Artifact, plugin: Path | None) -> None:
        assert isinstance(artifact, LiteRtArtifact)
        self.model = flatbuffer.read(artifact.path.read_bytes())
        self.inputs, self.outputs = flatbuffer.signature(self.model)
        self.values, self.layers = artifact.values, artifact.layers
        self.sites: tuple[ScanSite, ...] = artifact.details["scans"]
        self.names = tuple(site.name for site in self.sites)

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """Run one inference. Returns u, delta, B, C and y of each scan."""
        names = {name for site in self.sites for name in (*(site.reads[key] for key in VARIABLE), site.writes)}
        found = self._run(self.inputs, {name: self.values[name].tensor for name in sorted(names)}, feeds)
        values = {name: self._value(name, value) for name, value in found.items()}
        return [{**{key: values[site.reads[key]] for key in VARIABLE}, "y": values[site.writes]} for site in self.sites]

    def with_layer(self, path: str, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the outputs, and under `path` the output of the convolution of this module."""
        name = self.layers[f"{path}/Conv"]
        found = self._run(self.inputs, {**self.outputs, path: self.values[name].tensor}, feeds)
        return {**found, path: self._value(name, found[path])}

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Run scan `index` by itself on u, delta, B and C. Returns y."""
        site = self.sites[index]
        reads = {key: self.values[site.reads[key]] for key in VARIABLE}
        inputs = {key: value.tensor for key, value in reads.items()}
        given = {key: np.transpose(feeds[key], value.order) for key, value in reads.items()}
        return self._value(site.writes, self._run(inputs, {"y": self.values[site.writes].tensor}, given)["y"])

    def _run(self, inputs: Mapping[str, int], outputs: Mapping[str, int], feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run the part of the file between these tensors."""
        with LiteRt(flatbuffer.part(self.model, inputs, outputs)) as runtime:
            return runtime.run(feeds)

    def _value(self, name: str, found: NDArray[Any]) -> NDArray[Any]:
        """Return a tensor with the axes of the ONNX value that it holds."""
        value = self.values[name]
        assert found.shape == permuted(value.shape, value.order)
        return np.transpose(in_float(value, found), np.argsort(value.order))
