"""Access to the scans of an OpenVINO artifact."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.export.hub.graph import ScanSite
from evm_deploy.export.openvino.ir import SCAN_CONSTANTS, SCAN_READS, cut_out, outputs_by_name, save
from evm_deploy.export.target import Artifact
from evm_deploy.runtimes.base import Feeds, RunOptions
from evm_deploy.runtimes.openvino import OpenVinoRuntime, open_core, read
from evm_deploy.scan.fused import SCAN_OUTPUTS
from evm_deploy.scan.onnx_function import INPUTS, OP_TYPE, OUTPUT


class OpenVinoScanAccess:
    """Per-scan access to an IR on the CPU. Scans are inside nodes of the extension, or made of standard operators."""

    def __init__(self, artifact: Artifact, plugin: Path | None) -> None:
        self.plugin = plugin
        self.core = open_core(plugin)
        self.model = read(self.core, artifact.path)
        self.sites: tuple[ScanSite, ...] = artifact.details["scans"]
        self.names = tuple(site.name for site in self.sites)

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """Run one inference. Returns u, delta, B, C and y of each scan, as the scan reads and writes them."""
        tapped = self.model.clone()
        nodes = {node.friendly_name: node for node in tapped.get_ops()}
        for site in self.sites:
            if site.inside:
                nodes[site.inside].set_attribute("scan_outputs", True)
        tapped.validate_nodes_and_infer_types()
        by_name = outputs_by_name(tapped)
        wanted: dict[str, Any] = {}  # name -> output: scans may share a tensor
        names: dict[tuple[str, str], str] = {}
        for site in self.sites:
            if site.inside:
                outputs = dict(zip(SCAN_OUTPUTS, nodes[site.inside].outputs()[1:], strict=True))
            else:
                outputs = {**{key: by_name[site.reads[key]] for key in SCAN_READS}, "y": by_name[site.writes]}
            for key, output in outputs.items():
                name = f"{output.get_node().friendly_name}:{output.get_index()}"
                names[site.name, key] = name
                output.get_tensor().set_names({name})
                wanted[name] = output
        tapped.add_outputs([*wanted.values()])
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "tapped.xml"
            save(tapped, path, exact_results=True)
            with OpenVinoRuntime(path, RunOptions(plugin=self.plugin)) as runtime:
                values = runtime.run(feeds)
        return [{key: values[names[site.name, key]] for key in SCAN_OUTPUTS} for site in self.sites]

    def with_layer(self, path: str, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the outputs, and under `path` the output of the convolution of this module."""
        tapped = self.model.clone()
        output = outputs_by_name(tapped)[f"{path}/Conv"]
        output.get_tensor().set_names({path})
        tapped.add_outputs([output])
        with OpenVinoRuntime(tapped, RunOptions(plugin=self.plugin)) as runtime:
            return runtime.run(feeds)

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Run scan `index` by itself on u, delta, B and C. Returns y."""
        site = self.sites[index]
        model = self._node_alone(site, feeds) if site.inside else cut_out(self.model.clone(), site)
        with OpenVinoRuntime(model, RunOptions(plugin=self.plugin)) as runtime:
            return runtime.run(feeds)[OUTPUT]

    def _node_alone(self, site: ScanSite, feeds: Feeds) -> Any:
        """Return the scan as a model of one node, with the block's constants."""
        from openvino import Model, opset13
        from openvino.utils.node_factory import NodeFactory

        by_name = outputs_by_name(self.model)
        values: dict[str, Any] = {key: opset13.parameter(feeds[key].shape, np.float32, name=key) for key in SCAN_READS}
        parameters = list(values.values())
        for key in SCAN_CONSTANTS:
            values[key] = opset13.constant(by_name[site.reads[key]].get_node().data)
        for key, parameter in zip(SCAN_READS, parameters, strict=True):
            parameter.output(0).get_tensor().set_names({key})
        factory = NodeFactory()
        factory.add_extension(str(self.plugin))
        node = factory.create(OP_TYPE, [values[key] for key in INPUTS])
        node.output(0).get_tensor().set_names({OUTPUT})
        return Model([node], parameters, site.name)
