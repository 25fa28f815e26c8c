"""Access to the scans of an ONNX artifact in ONNX Runtime, for `onnx` and other targets that are verified there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.export.hub.graph import ScanSite, scan_alone
from evm_deploy.runtimes.base import Feeds
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.scan import onnx_function

if TYPE_CHECKING:
    from evm_deploy.export.target import Artifact


class OnnxScanAccess:
    """Per-scan access to an ONNX artifact in ONNX Runtime. Scans may be nodes, inside fused nodes, or inlined."""

    def __init__(self, artifact: Artifact, plugin: Path | None) -> None:
        import onnx

        self.plugin = plugin
        self.model = onnx.load(str(artifact.path))
        self.sites: tuple[ScanSite, ...] = artifact.details["scans"]
        self.names = tuple(site.name for site in self.sites)

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """Run one inference. Returns u, delta, B, C and y of each scan."""
        import onnx

        tapped = onnx.ModelProto()
        tapped.CopyFrom(self.model)
        fused = {site.inside: site for site in self.sites if site.inside}
        for node in tapped.graph.node:
            if node.name in fused:
                site = fused[node.name]
                node.output[1:] = [*self._variable(site).values(), site.writes]
        wanted = {name for site in self.sites for name in (*self._variable(site).values(), site.writes)}
        wanted -= {value.name for value in tapped.graph.output}
        tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
        with OnnxRuntime(tapped.SerializeToString(), plugin=self.plugin) as runtime:
            values = runtime.run(feeds)
        return [
            {**{key: values[name] for key, name in self._variable(site).items()}, "y": values[site.writes]}
            for site in self.sites
        ]

    def with_layer(self, path: str, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the outputs, and under `path` the output of the convolution of this module."""
        import onnx

        tapped = onnx.ModelProto()
        tapped.CopyFrom(self.model)
        name = next(node.output[0] for node in tapped.graph.node if node.name == f"{path}/Conv")
        tapped.graph.output.append(onnx.ValueInfoProto(name=name))
        with OnnxRuntime(tapped.SerializeToString(), plugin=self.plugin) as runtime:
            values = runtime.run(feeds)
        return {**values, path: values.pop(name)}

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Run scan `index` by itself on u, delta, B and C. Returns y."""
        from onnx import numpy_helper
        from onnx.utils import Extractor

        site = self.sites[index]
        reads = self._variable(site)
        if site.inside:  # the same scan as a node of its own, with the block's constants
            constants = {t.name: t for t in self.model.graph.initializer}
            fixed = {key: numpy_helper.to_array(constants[site.reads[key]]) for key in ("A", "skip", "bias")}
            with OnnxRuntime(scan_alone(self.model).SerializeToString(), plugin=self.plugin) as runtime:
                return runtime.run({**feeds, **fixed})[onnx_function.OUTPUT]
        extracted = Extractor(self.model).extract_model(list(reads.values()), [site.writes])
        del extracted.functions[:]  # onnx 1.23 loses overloads
        extracted.functions.extend(self.model.functions)
        with OnnxRuntime(extracted.SerializeToString(), plugin=self.plugin) as runtime:
            values = runtime.run({reads[key]: value for key, value in feeds.items()})
        return values[site.writes]

    @staticmethod
    def _variable(site: ScanSite) -> dict[str, str]:
        return {key: site.reads[key] for key in ("u", "delta", "B", "C")}
