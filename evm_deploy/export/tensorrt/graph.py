"""ONNX graph for TensorRT's parser: precision in the graph, scans as standard ops or as nodes of a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evm_deploy.errors import UsageError
from evm_deploy.export.hub.fold_normalisation import fold_normalisation
from evm_deploy.export.hub.graph import ScanSite, check, scan_sites
from evm_deploy.export.hub.tools import to_fp16
from evm_deploy.export.hub.unroll import unroll
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.tensorrt.suppression import check_limits, use_plugin
from evm_deploy.runtimes.tensorrt import kernel
from evm_deploy.scan.onnx_function import DOMAIN, OP_TYPE, has_softplus

if TYPE_CHECKING:
    import onnx

HALF = ("fp16", "int8-fp16")
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": "1"}


def tensorrt_graph(hub: onnx.ModelProto, plan: ExportPlan) -> tuple[onnx.ModelProto, tuple[ScanSite, ...]]:
    """Convert the hub graph to a strongly typed graph for TensorRT. Returns the graph and its scans.

    Raises UsageError for a scan that the kernel does not support, for weights that float16 cannot hold, and for a
    selection of detections that TensorRT does not take.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(hub)
    fold_normalisation(model)
    if plan.settings and plan.settings.efficient_nms and not use_plugin(model, plan.imgsz or (0, 0)):
        raise UsageError("--efficient-nms: the network has no NMS", "leave --efficient-nms out")
    check_limits(model)
    if plan.precision in HALF:
        model = to_fp16(model, scan_sites(model))
        del model.graph.value_info[:]  # the converter leaves some types unchanged
        model = onnx.shape_inference.infer_shapes(model)
    sites = scan_sites(model)
    if plan.scan in ("aot", "plugin"):
        mark_for_plugin(model, plan)
    else:
        unroll(model, six_axes=True)
    del model.functions[:]  # the parser would prefer functions, or ignore their overloads
    check(model)
    return model, sites


def mark_for_plugin(model: onnx.ModelProto, plan: ExportPlan) -> int:
    """Mark every scan with its plugin. Returns how many. "aot" embeds the kernel, "plugin" needs a library for it.

    Raises UsageError for a scan that the kernel does not support: one without softplus, of more than 16 states, or of
    an A that is not constant.
    """
    from onnx import helper

    shapes = constant_shapes(model)
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    attributes = {**PLUGIN_ATTRIBUTES, **({"aot": 1} if plan.scan == "aot" else {})}
    for node, site in zip(nodes, scan_sites(model), strict=True):
        if not has_softplus(node):
            raise UsageError(
                f"scan {site.name} gets dt without softplus, and the kernel of --scan {plan.scan} computes softplus",
                "use --scan portable, which has both forms, or let the network pass delta before softplus",
            )
        if node.input[2] not in shapes:
            raise UsageError(
                f"A of scan {site.name} is computed at run time, and the kernel of --scan {plan.scan} needs constants",
                "use --scan portable",
            )
        K, D, N = shapes[node.input[2]]
        kernel.check_scan(plan.batch.max or 1, K, D, N)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return len(nodes)


def constant_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a graph's constants, by name."""
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
