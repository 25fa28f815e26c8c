"""Scans as standard ops without loop, function or node of our own, for compilers that take nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from evm_deploy.bundle.selftest import AXES, ScanShape
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.hub.graph import scan_alone, scan_sites
from evm_deploy.scan.onnx_function import DOMAIN, INPUTS, OP_TYPE, OUTPUT, Body, has_softplus
from evm_deploy.scan.unrolled import unrolled_scan

if TYPE_CHECKING:
    import onnx

CONTROL_FLOW = ("If", "Loop", "Scan")


def unroll(model: onnx.ModelProto, steps: Callable[[int, int], int] | None = None, *, six_axes: bool = False) -> int:
    """Replace every scan by standard ops, in place. Returns how many.

    steps(K, L): steps per chunk of a scan of K directions and L steps; None for those of `scan.unrolled`. six_axes: as
    in `unrolled_scan`.

    before:  %y = evm::SelectiveScan(%u, %delta, A, %B, %C, skip, bias)
    after:   %1 = Unsqueeze(bias);  %2 = Add(%delta, %1)  ..  %y = Add(%8, %9)        new names start with the old
    """
    sizes = scan_sizes(model)
    kept: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
            kept.append(node)
            continue
        reads = dict(zip(INPUTS, node.input, strict=True))
        K, L = sizes[node.output[0]]
        T = steps(K, L) if steps else None
        how = {"softplus": has_softplus(node), "six_axes": six_axes}
        kept += unrolled_scan(reads, node.output[0], L, f"{node.name}/", T, **how)
        count += 1
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for opset in [opset for opset in model.opset_import if opset.domain == DOMAIN]:
        model.opset_import.remove(opset)
    return count


def scan_sizes(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Return the directions K and the length L of every scan, by the name of its output.

    Raises ToolchainError for an unknown size.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model)
    known = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
    found = {}
    for site in scan_sites(model):
        shapes = [known[name] for name in (site.reads["u"], site.writes) if len(known.get(name, ())) == 4]
        K, L = (max((int(shape[axis].dim_value) for shape in shapes), default=0) for axis in (1, 2))
        if not L:
            raise ToolchainError(
                f"the length of scan {site.name} is not known", "report this, with the output of evm-doctor"
            )
        found[site.writes] = K, L
    return found


def static(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose scans are unrolled without its functions, and with the shape of every tensor in it.

    Raises UsageError naming the node if a loop or a branch is left, or a shape depends on the values of the input.
    """
    import onnx

    del model.functions[:], model.graph.value_info[:]  # value_info: float16's converter leaves some types unchanged
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, data_prop=True)
    values = [*inferred.graph.value_info, *inferred.graph.output]
    known = {value.name for value in values if _is_static(value)}
    for node in inferred.graph.node:
        loops = node.op_type in CONTROL_FLOW
        if loops or not known.issuperset(filter(None, node.output)):
            why = "is control flow" if loops else "gives a shape that depends on the image"
            raise UsageError(
                f"the target needs a graph without control flow, of static shapes; {node.name} ({node.op_type}) {why}",
                "export it for another target; for a RetinaNet, --nms none leaves such nodes out",
            )
    return inferred


def _is_static(value: onnx.ValueInfoProto) -> bool:
    """Test whether a value is a tensor of known rank and sizes."""
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)


def unrolled_alone(
    hub: onnx.ModelProto, length: int, shape: ScanShape | None = None, steps: int | None = None
) -> onnx.ModelProto:
    """Return a model of one unrolled scan of `length` steps: seven inputs of any size, u of at most that many steps.

    hub: graph whose opset the model has. Shorter sequences are padded at the end, which no earlier step reads.
    shape: fixed sizes of all inputs, L as `length`; the model then has static shapes, and no padding. steps: per chunk.

    before:  %y = evm::SelectiveScan(%u, %delta, A, %B, %C, skip, bias)
    after:   %1 = Pad(%u);  ..  %9 = the unrolled scan of %1, ..;  %y = Slice(%9) to the length of u
    """
    model = scan_alone(hub)
    del model.functions[:], model.graph.node[:]
    for opset in [opset for opset in model.opset_import if opset.domain == DOMAIN]:
        model.opset_import.remove(opset)
    if shape:
        for value in (*model.graph.input, *model.graph.output):
            for dim, axis in zip(value.type.tensor_type.shape.dim, AXES.get(value.name, AXES["u"]), strict=True):
                dim.dim_value = {"b": 1, **shape._asdict()}[axis]
        model.graph.node.extend(unrolled_scan({name: name for name in INPUTS}, OUTPUT, length, f"{OP_TYPE}/", steps))
        return model
    f = Body("pad/")
    given = f.dim("u", 2)
    pads = f.op("Concat", f.const([0] * 6), f.op("Sub", f.const([length]), given), f.const([0]), axis=0)
    padded = {name: f.op("Pad", name, pads) for name in ("u", "delta", "B", "C")}
    reads = {name: padded.get(name, name) for name in INPUTS}
    model.graph.node.extend([*f.nodes, *unrolled_scan(reads, "long", length, f"{OP_TYPE}/", steps)])
    end = Body("cut/")
    end.write("Slice", ["long", end.const([0]), given, end.const([2])], OUTPUT)
    model.graph.node.extend(end.nodes)
    return model
