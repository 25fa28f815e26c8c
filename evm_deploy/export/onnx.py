"""Target `onnx`: one file that runs on a stock ONNX Runtime, and anywhere that knows ONNX functions."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evm_deploy import cross
from evm_deploy.errors import UsageError
from evm_deploy.export.fold_normalisation import fold_normalisation
from evm_deploy.export.graph import Graph, ScanSite, check, scan_sites
from evm_deploy.export.outline import outline
from evm_deploy.export.plan import Choice, ExportPlan
from evm_deploy.export.target import Artifact, Probe, Target
from evm_deploy.onnx_tools import in_order
from evm_deploy.plugins import find_plugin
from evm_deploy.runtimes.base import Feeds, Runtime
from evm_deploy.runtimes.onnxruntime import INSTALL_HINT, OnnxRuntime
from evm_deploy.scan import onnx_function

if TYPE_CHECKING:
    import onnx

FP16_MAX = 65504.0
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
    details = {"opset": plan.opset, "ir_version": model.ir_version, "nodes": len(model.graph.node), "scans": sites}
    return Artifact(path, scan, details)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and activations float16, inputs and outputs as before, every scan float32 between casts.

    Raises UsageError naming the weights that float16 cannot hold; onnxruntime's converter would clip them.
    """
    from onnx import TensorProto, numpy_helper
    from onnxruntime.transformers.float16 import convert_float_to_float16

    scan_constants = {name for site in scan_sites(model) for name in site.reads.values()}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scan_constants:
            largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
            if largest > FP16_MAX:
                raise UsageError(
                    f"--fp16: {tensor.name} reaches {largest:.4g}, float16 ends at {FP16_MAX:.0f}",
                    "export fp32 instead",
                )
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


def open_(path: Path, threads: int | None, plugin: Path | None) -> Runtime:
    return OnnxRuntime(path, threads, plugin)


def plugin() -> Path | None:
    return find_plugin("onnxruntime")


def build_plugin(platform: str) -> Path:
    return cross.library("onnxruntime", platform)


def write_scan_probe(graph: Graph, plan: ExportPlan, folder: Path) -> str:
    """Write `scan.onnx`, one scan with all seven tensors as inputs and any shape, lowered as in the artifact."""
    import onnx

    model = scan_alone(graph.model)
    if plan.scan == "portable":
        model = onnx.inliner.inline_local_functions(model)
    (folder / "scan.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return "scan.onnx"


def scan_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """One evm::SelectiveScan node on seven graph inputs of any shape, with the portable body that `model` has."""
    from onnx import TensorProto, helper

    ranks = {"u": 4, "delta": 4, "A": 3, "B": 4, "C": 4, "skip": 2, "bias": 2}
    inputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, [None] * ranks[k]) for k in onnx_function.INPUTS]
    output = helper.make_tensor_value_info(onnx_function.OUTPUT, TensorProto.FLOAT, [None] * 4)
    node = helper.make_node(
        onnx_function.OP_TYPE, onnx_function.INPUTS, [onnx_function.OUTPUT], domain=onnx_function.DOMAIN
    )
    result: onnx.ModelProto = helper.make_model(
        helper.make_graph([node], "scan", inputs, [output]),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
        functions=[function for function in model.functions if function.name == onnx_function.OP_TYPE],
        producer_name="evm-deploy",
    )
    return result


TARGET = Target(
    name="onnx",
    aliases=("ort", "onnxruntime"),
    precisions=("fp32", "fp16", "int8", "w8"),
    scans=("auto", "portable"),
    probe=probe,
    build=build,
    taps=OnnxScanTaps,
    open=open_,
    plugin=plugin,
    build_plugin=build_plugin,
    write_scan_probe=write_scan_probe,
)
