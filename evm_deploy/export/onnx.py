"""Target `onnx`: one file that runs on a stock ONNX Runtime, and anywhere that knows ONNX functions."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evm_deploy import cross
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.fold_normalisation import fold_normalisation
from evm_deploy.export.graph import Graph, ScanSite, check, scan_alone, scan_sites
from evm_deploy.export.onnx_usage import usage
from evm_deploy.export.outline import outline
from evm_deploy.export.plan import DEFAULT_OPSET, Choice, ExportPlan
from evm_deploy.export.target import Artifact, Probe, ScanShape, Target
from evm_deploy.onnx_tools import check_fp16_range, in_order
from evm_deploy.platforms import PLATFORMS
from evm_deploy.plugins import HINT, find_plugin, kernel_isa, not_built
from evm_deploy.runtimes.base import Feeds, RunOptions, Runtime
from evm_deploy.runtimes.onnxruntime import INSTALL_HINT, OnnxRuntime
from evm_deploy.scan import onnx_function

if TYPE_CHECKING:
    import onnx

BUILD_PACKAGES = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")


def probe() -> Probe:
    """Which of the packages are here, without importing them."""
    versions = {name: metadata.version(name) for name in BUILD_PACKAGES if find_spec(name)}
    missing = [name for name in BUILD_PACKAGES if name not in versions]
    return Probe(not missing, "onnxruntime" in versions, versions, INSTALL_HINT if missing else "")


def build(graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    """Write `folder/model.onnx`: the hub graph in the plan's precision and scan lowering.

    With `auto` whole blocks are nodes; in float16 only the scans, which stay float32 between casts.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    fold_normalisation(model)
    if plan.precision == "fp16":
        model = to_fp16(model)
    sites = scan_sites(model)
    if plan.scan == "portable":
        model = onnx.inliner.inline_local_functions(model)
        scan = Choice("portable", "as asked, standard ops only: no function, no node of domain evm")
    else:
        if plan.precision != "fp16":
            for module, op in graph.fusable.items():
                outline(model, module, op)
            sites = scan_sites(model, graph.fusable)
        scan = Choice(
            "plugin+portable", "one file: evm nodes for the native kernel, portable body where it is not registered"
        )
    check(model)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    details = {
        "opset": plan.opset or DEFAULT_OPSET,
        "ir_version": model.ir_version,
        "nodes": len(model.graph.node),
        "scans": sites,
    }
    return Artifact(path, scan, details)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and activations float16, inputs and outputs as before, every scan float32 between casts.

    Raises UsageError naming the weights that float16 cannot hold.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    check_fp16_range(model, scan_sites(model))
    functions = list(model.functions)
    half: onnx.ModelProto = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        min_positive_val=5.97e-8,  # float16's smallest; the converter's default would move smaller weights further
        op_block_list=[onnx_function.OP_TYPE, "Resize"],
    )
    if not half.functions:
        half.functions.extend(functions)
    return in_order(half)


class OnnxScanTaps:
    """Per-scan access to an ONNX artifact in ONNX Runtime, whether its scans are nodes, inside nodes, or inlined."""

    def __init__(self, artifact: Artifact, plugin: Path | None) -> None:
        import onnx

        self.plugin = plugin
        self.model = onnx.load(str(artifact.path))
        self.sites: tuple[ScanSite, ...] = artifact.details["scans"]
        self.names = tuple(site.name for site in self.sites)

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
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

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
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
        with OnnxRuntime(extracted.SerializeToString(), plugin=self.plugin) as runtime:
            values = runtime.run({reads[key]: value for key, value in feeds.items()})
        return values[site.writes]

    @staticmethod
    def _variable(site: ScanSite) -> dict[str, str]:
        return {key: site.reads[key] for key in ("u", "delta", "B", "C")}


def open_(path: Path, options: RunOptions) -> Runtime:
    if options.device not in (None, "CPU"):
        raise UsageError(f"device {options.device!r}: ONNX Runtime's CPU provider is the only one that is used")
    if options.cache:
        raise UsageError("ONNX Runtime keeps no compiled models", "leave the cache out")
    return OnnxRuntime(path, options.threads, options.plugin)


def plugin() -> Path:
    path = find_plugin("onnxruntime")
    if path is None:
        raise ToolchainError(not_built(), HINT)
    return path


def build_plugin(platform: str) -> Path:
    return cross.library("onnxruntime", platform)


def write_scan_probe(graph: Graph, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    """Write one scan with all seven tensors as inputs and any shape, lowered as in the artifact."""
    import onnx

    model = scan_alone(graph.model)
    if artifact.scan.value == "portable":
        model = onnx.inliner.inline_local_functions(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


TARGET = Target(
    name="onnx",
    aliases=("ort", "onnxruntime"),
    precisions=("fp32", "fp16", "int8", "w8"),
    scans=("auto", "portable"),
    devices=tuple(PLATFORMS),
    probe=probe,
    build=build,
    taps=OnnxScanTaps,
    open=open_,
    plugin=plugin,
    isa=kernel_isa,
    build_plugin=build_plugin,
    scan_probe="scan.onnx",
    write_scan_probe=write_scan_probe,
    usage=usage,
)
