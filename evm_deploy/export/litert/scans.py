"""Access to the scans of a TFLite file: taps on its tensors, and single scans cut out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Per-scan access to a TFLite file, by changed copies of the file itself."""

    def __init__(self, artifact: Artifact, plugin: Path | None) -> None:
        assert isinstance(artifact, LiteRtArtifact)
        self.data, self.values, self.layers = artifact.path.read_bytes(), artifact.values, artifact.layers
        self.sites: tuple[ScanSite, ...] = artifact.details["scans"]
        self.names = tuple(site.name for site in self.sites)

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """Run one inference. Returns u, delta, B, C and y of each scan."""
        names = [name for site in self.sites for name in (*(site.reads[key] for key in VARIABLE), site.writes)]
        values = self._tapped(list(dict.fromkeys(names)), feeds)
        return [{**{key: values[site.reads[key]] for key in VARIABLE}, "y": values[site.writes]} for site in self.sites]

    def with_layer(self, path: str, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the outputs, and under `path` the output of the convolution of this module."""
        name = self.layers[f"{path}/Conv"]
        model = flatbuffer.read(self.data)
        signature = model.signatureDefs[0]
        outputs = {each.name.decode(): each.tensorIndex for each in signature.outputs}
        flatbuffer.set_signature(model, None, {**outputs, path: self.values[name].tensor})
        with LiteRt(flatbuffer.pack(model)) as runtime:
            found = runtime.run(feeds)
        return {**found, path: self._value(name, found[path])}

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Run scan `index` by itself on u, delta, B and C. Returns y."""
        site = self.sites[index]
        reads = {key: self.values[site.reads[key]] for key in VARIABLE}
        model = flatbuffer.read(self.data)
        graph = model.subgraphs[0]
        y = self.values[site.writes].tensor
        graph.operators = behind(graph.operators, y, [value.tensor for value in reads.values()])
        flatbuffer.set_signature(model, {key: value.tensor for key, value in reads.items()}, {"y": y})
        given = {key: np.transpose(feeds[key], value.order) for key, value in reads.items()}
        with LiteRt(flatbuffer.pack(model)) as runtime:
            return self._value(site.writes, runtime.run(given)["y"])

    def _tapped(self, names: Sequence[str], feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference with these values of the ONNX graph as the only outputs. Returns them by name."""
        model = flatbuffer.read(self.data)
        flatbuffer.set_signature(model, None, {name: self.values[name].tensor for name in names})
        with LiteRt(flatbuffer.pack(model)) as runtime:
            return {name: self._value(name, found) for name, found in runtime.run(feeds).items()}

    def _value(self, name: str, found: NDArray[Any]) -> NDArray[Any]:
        """Return a tensor with the axes of the ONNX value that it holds."""
        value = self.values[name]
        assert found.shape == permuted(value.shape, value.order)
        return np.transpose(in_float(value, found), np.argsort(value.order))


def behind(operators: Sequence[Any], tensor: int, ends: Sequence[int]) -> list[Any]:
    """Return the operators that compute `tensor` from the tensors `ends`, in their order."""
    makers = {made: operator for operator in operators for made in operator.outputs}
    waiting, found, known = [tensor], set(), set(ends)
    while waiting:
        operator = makers.get(waiting.pop())
        if operator is not None and id(operator) not in found:
            found.add(id(operator))
            waiting += [read for read in operator.inputs if read not in known]
    return [operator for operator in operators if id(operator) in found]
