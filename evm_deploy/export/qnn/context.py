"""Compilation of loop-free graphs to context binaries, and access to the scans of these graphs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.silence import silence_libraries
from evm_deploy.errors import EvmError, ToolchainError, UsageError
from evm_deploy.export.hub.graph import ScanSite
from evm_deploy.export.qnn.settings import QnnSettings
from evm_deploy.export.target import Artifact
from evm_deploy.runtimes.base import Feeds
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.runtimes.providers import open_session
from evm_deploy.runtimes.qnn import on_npu, require_plugin

if TYPE_CHECKING:
    import onnx

VARIABLE = ("u", "delta", "B", "C")  # inputs of a scan that are not constant


@dataclass(frozen=True)
class QnnArtifact(Artifact):
    """Context binary, and the graph that it was compiled from. graph: standard operators. settings: of the SoC."""

    graph: onnx.ModelProto | None = None
    settings: QnnSettings | None = None


def compile_context(model: onnx.ModelProto, path: Path, settings: QnnSettings) -> None:
    """Write the context binary of a graph to `path`: an ONNX file of one EPContext node, for this SoC.

    Raises UsageError if the NPU does not take a node, ToolchainError if the plugin is missing or fails.
    """
    require_plugin()
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "context.onnx")
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", str(written))
        options.add_session_config_entry("ep.context_embed_mode", "1")
        try:
            with silence_libraries():
                opened = open_session(ort, model.SerializeToString(), options, on_npu(settings.options), None)
        except UsageError as error:
            raise UsageError(f"the NPU does not take the network: {error.args[0]}", "use another target") from error
        except EvmError:
            raise
        except Exception as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ToolchainError(f"QNN cannot compile the network for {settings.name}: {message}") from error
        del opened
        made = onnx.load(str(written))
    kinds = [node.op_type for node in made.graph.node]
    if kinds != ["EPContext"]:
        raise ToolchainError(f"QNN made {len(kinds)} nodes, not one context", "report this, with evm-doctor's output")
    path.write_bytes(made.SerializeToString(deterministic=True))


class QnnScanAccess:
    """Per-scan access to the graph of a context binary, compiled anew for each question, in float16 as on the NPU."""

    def __init__(self, artifact: Artifact, plugin: Path | None) -> None:
        assert isinstance(artifact, QnnArtifact) and artifact.graph is not None and artifact.settings is not None
        self.graph, self.settings = artifact.graph, artifact.settings
        self.sites: tuple[ScanSite, ...] = artifact.details["scans"]
        self.names = tuple(site.name for site in self.sites)

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """Run one inference. Returns u, delta, B, C and y of each scan."""
        names = [name for site in self.sites for name in (*(site.reads[key] for key in VARIABLE), site.writes)]
        values = self._with(list(dict.fromkeys(names)), feeds)
        return [{**{key: values[site.reads[key]] for key in VARIABLE}, "y": values[site.writes]} for site in self.sites]

    def with_layer(self, path: str, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the outputs, and under `path` the output of the convolution of this module."""
        name = next(node.output[0] for node in self.graph.graph.node if node.name == f"{path}/Conv")
        values = self._with([name], feeds)
        return {**values, path: values.pop(name)}

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Run scan `index` by itself on u, delta, B and C. Returns y."""
        from onnx.utils import Extractor

        site = self.sites[index]
        extracted = Extractor(self.graph).extract_model([site.reads[key] for key in VARIABLE], [site.writes])
        return self._run(extracted, {site.reads[key]: value for key, value in feeds.items()})[site.writes]

    def _with(self, names: list[str], feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run the graph with further tensors as outputs, by their names."""
        import onnx

        tapped = onnx.ModelProto()
        tapped.CopyFrom(self.graph)
        there = {value.name for value in tapped.graph.output}
        known = {value.name: value for value in tapped.graph.value_info}
        tapped.graph.output.extend(known[name] for name in names if name not in there)
        return self._run(tapped, feeds)

    def _run(self, model: onnx.ModelProto, feeds: Feeds) -> dict[str, NDArray[Any]]:
        with OnnxRuntime(model.SerializeToString(), 1, settings=on_npu(self.settings.options)) as runtime:
            return runtime.run(feeds)
