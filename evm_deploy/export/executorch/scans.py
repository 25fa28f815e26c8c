"""Access to the scans of a program of ExecuTorch, for verification.

Our library tells what each scan of a program reads and writes. Scans in standard operators are found in the graph that
the program was lowered from: it is lowered again, with their tensors as outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.bundle.selftest import AXES
from evm_deploy.errors import ToolchainError
from evm_deploy.export.executorch.program import lower
from evm_deploy.export.hub.graph import ScanSite, scan_alone
from evm_deploy.export.target import Artifact
from evm_deploy.runtimes.base import Feeds, RunOptions
from evm_deploy.runtimes.executorch import ExecuTorchRuntime
from evm_deploy.scan.onnx_function import OUTPUT, SOFTPLUS
from evm_deploy.toolchain.executorch_library import recorded_scans

if TYPE_CHECKING:
    import onnx

VARIABLE = ("u", "delta", "B", "C")  # inputs of a scan that are not constant
CONSTANT = ("A", "skip", "bias")


@dataclass(frozen=True)
class ExecuTorchArtifact(Artifact):
    """Program of ExecuTorch. graph: what it was lowered from; blocks may be nodes of it. order: as `Program.scans`."""

    graph: onnx.ModelProto | None = None
    order: tuple[str, ...] = ()

    @property
    def portable(self) -> bool:
        """Whether scans are standard operations."""
        return self.scan.value == "portable"


def scan_program(hub: onnx.ModelProto, sizes: Mapping[str, int], *, portable: bool, softplus: bool = True) -> bytes:
    """Return the program of one scan, with all seven tensors as inputs. sizes: of the axes b, K, L, D and N."""
    model = scan_alone(hub)
    del model.functions[:]
    for value in (*model.graph.input, *model.graph.output):
        for dim, axis in zip(value.type.tensor_type.shape.dim, AXES.get(value.name, AXES["u"]), strict=True):
            dim.dim_value = sizes[axis]
    if not softplus:
        model.graph.node[0].attribute.add(name=SOFTPLUS, i=0, type=2)
    return _lowered_scan(model.SerializeToString(deterministic=True), portable)


@lru_cache(maxsize=64)
def _lowered_scan(model: bytes, portable: bool) -> bytes:
    """Lower a graph of one scan: many scans of a network, and its self-test, have the same."""
    import onnx

    return lower(onnx.load_from_string(model), portable=portable).file


class ExecuTorchScanAccess:
    """Per-scan access to a program, in ExecuTorch. plugin: our library, None for the installed one."""

    def __init__(self, artifact: Artifact, plugin: Path | None) -> None:
        from onnx import numpy_helper

        assert isinstance(artifact, ExecuTorchArtifact) and artifact.graph is not None
        self.artifact, self.graph, self.plugin = artifact, artifact.graph, plugin
        self.sites: tuple[ScanSite, ...] = artifact.details["scans"]
        self.names = tuple(site.name for site in self.sites)
        tensors = {tensor.name: tensor for tensor in self.graph.graph.initializer}
        self.constants = [
            {key: numpy_helper.to_array(tensors[site.reads[key]]) for key in CONSTANT} for site in self.sites
        ]

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """Run one inference. Returns u, delta, B, C, y of each scan, and its constants as the program has them."""
        if self.artifact.portable:
            names = [name for site in self.sites for name in (*(site.reads[key] for key in VARIABLE), site.writes)]
            values = self._with(names, feeds)
            return [
                {**{key: values[site.reads[key]] for key in VARIABLE}, "y": values[site.writes]} for site in self.sites
            ]
        with ExecuTorchRuntime(self.artifact.path, RunOptions(plugin=self.plugin)) as runtime, recorded_scans() as told:
            runtime.run(feeds)
        return self._in_order(told)

    def with_layer(self, path: str, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the outputs, and under `path` the output of the convolution of this module."""
        name = next(node.output[0] for node in self.graph.graph.node if node.name == f"{path}/Conv")
        values = self._with([name], feeds)
        return {**values, path: values.pop(name)}

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Run scan `index` by itself on u, delta, B and C, with its own A, skip and bias. Returns y."""
        (b, K, L, D), N = feeds["u"].shape, feeds["B"].shape[-1]
        nodes = (node for node in self.graph.graph.node if node.output[0] == self.sites[index].writes)
        softplus = all(each.i for node in nodes for each in node.attribute if each.name == SOFTPLUS)
        sizes = {"b": b, "K": K, "L": L, "D": D, "N": N}
        program = scan_program(self.graph, sizes, portable=self.artifact.portable, softplus=softplus)
        return self._run(program, {**feeds, **self.constants[index]})[OUTPUT]

    def _in_order(self, told: Sequence[dict[str, NDArray[np.float32]]]) -> list[dict[str, NDArray[np.float32]]]:
        """Return what the scans told, in the order of `sites`: the program may run independent ones in another."""
        order = self.artifact.order
        if len(told) != len(order):
            raise ToolchainError(
                f"{len(told)} scans have run in ExecuTorch, the program has {len(order)}", "report this"
            )
        makers = {node.output[0]: node.name for node in self.graph.graph.node}
        by_node = dict(zip(order, told, strict=True))
        return [by_node[site.inside or makers[site.writes]] for site in self.sites]

    def _with(self, names: list[str], feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run the graph with further tensors as outputs, by their names."""
        import onnx

        tapped = onnx.ModelProto()
        tapped.CopyFrom(self.graph)
        there = {value.name for value in tapped.graph.output}
        for name in dict.fromkeys(names):
            if name not in there:
                tapped.graph.output.add(name=name)
        return self._run(lower(tapped, portable=self.artifact.portable).file, feeds)

    def _run(self, program: bytes, feeds: Feeds) -> dict[str, NDArray[Any]]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "program.pte")
            path.write_bytes(program)
            with ExecuTorchRuntime(path, RunOptions(plugin=self.plugin)) as runtime:
                return runtime.run(feeds)
