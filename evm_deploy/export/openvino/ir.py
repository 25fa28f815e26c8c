"""Conversion of an ONNX graph to an OpenVINO model, and passes on that model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy.errors import ToolchainError
from evm_deploy.export.hub.graph import ScanSite
from evm_deploy.runtimes.openvino import RT_INFO, reason
from evm_deploy.tasks.task import SELECTION

if TYPE_CHECKING:
    import onnx

SCAN_READS = ("u", "delta", "B", "C")  # inputs of a scan that are not constant
SCAN_CONSTANTS = ("A", "skip", "bias")


def convert(core: Any, proto: onnx.ModelProto) -> Any:
    """Convert an ONNX graph to an openvino.Model. The graph's functions must be inlined or operators of `core`.

    The model is simplified with the passes of OpenVINO's own converter (ovc), without ovc itself, because ovc reports
    its use over the network. Tensors keep their names. Raises ToolchainError if OpenVINO cannot convert it.
    """
    import onnx
    from openvino._offline_transformations import apply_moc_transformations

    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.functions[:], bare.metadata_props[:]
    for node in bare.graph.node:  # drop unread outputs of blocks: OpenVINO would request them from the extension
        while not node.output[-1]:
            node.output.pop()
    try:
        model = core.read_model(bare.SerializeToString())
    except RuntimeError as error:
        raise ToolchainError(
            f"OpenVINO cannot convert the network: {reason(error)}",
            "export it with --target onnx, or write that part with other operations of torch",
        ) from error
    apply_moc_transformations(model, cf=False, smart_reshape=False)
    multiply_outer_products(model)
    normalise_rows(model)
    number_unnamed(model)
    return model


def multiply_outer_products(model: Any) -> int:
    """Replace each MatMul of a column and a row by a Multiply, in the loops of portable scans. Returns how many.

    before:  MatMul((.., N, 1), (.., 1, D))
    after:   Multiply((.., N, 1), (.., 1, D))      the same bits; the whole model is 4 % faster
    """
    from openvino import opset13

    done = 0
    for loop in [node for node in model.get_ops() if node.get_type_name() == "TensorIterator"]:
        for node in [node for node in loop.get_function().get_ops() if node.get_type_name() == "MatMul"]:
            column, row = node.input_values()
            if column.partial_shape[-1] == 1 and row.partial_shape[-2] == 1 and not any(node.get_attributes().values()):
                node.output(0).replace(opset13.multiply(column, row).output(0))
                done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def normalise_rows(model: Any) -> int:
    """Reshape the input of each LayerNorm of four or more dimensions to (batch, rows, channels). Returns how many.

    OpenVINO's CPU plugin has a kernel for three dimensions. It splits a LayerNorm of more dimensions into four nodes.

    before:  MVN((B, H, W, C), axis 3)
    after:   Reshape((B, HW, C)) -> MVN(.., axis 2) -> Reshape((B, H, W, C))
    """
    from openvino import opset13

    done = 0
    for node in [node for node in model.get_ops() if node.get_type_name() == "MVN"]:
        x, axes = node.input_values()
        shape = [*x.partial_shape] if x.partial_shape.rank.is_static else []
        if len(shape) < 4 or shape[-1].is_dynamic or axes.get_node().get_type_name() != "Constant":
            continue
        if {int(axis) % len(shape) for axis in axes.get_node().data.reshape(-1)} != {len(shape) - 1}:
            continue
        readers = node.output(0).get_target_inputs()
        rows = opset13.reshape(x, opset13.constant([0, -1, shape[-1].get_length()]), special_zero=True)
        node.input(0).replace_source_output(rows.output(0))
        node.input(1).replace_source_output(opset13.constant([2]).output(0))
        known = all(size.is_static for size in shape[1:])
        sizes = opset13.constant([0, *(size.get_length() for size in shape[1:])]) if known else opset13.shape_of(x)
        back = opset13.reshape(node, sizes, special_zero=True).output(0)
        back.get_tensor().set_names(node.output(0).get_names())
        node.output(0).get_tensor().set_names(set())
        for reader in readers:
            reader.replace_source_output(back)
        done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def number_unnamed(model: Any) -> int:
    """Number the nodes that a pass created without a name, in execution order. Returns how many.

    before:  Constant_5094, Multiply_5102      numbers count the nodes that the process has created
    after:   Constant_0, Multiply_0            the same bytes every time
    """
    numbers: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if re.fullmatch(r"\w+_\d+", node.friendly_name) and kind != "Parameter":
            node.friendly_name = f"{kind}_{numbers[kind]}"
            numbers[kind] += 1
        if kind == "TensorIterator":
            number_unnamed(node.get_function())
    return sum(numbers.values())


def outputs_by_name(model: Any) -> dict[str, Any]:
    """Return every output of every node, by each name of the output's tensor."""
    return {name: out for node in model.get_ops() for out in node.outputs() for name in out.get_names()}


def halve_weights(model: Any, sites: Sequence[ScanSite]) -> None:
    """Store the constants as float16, except those of scans: A, skip and bias would change by a relative 0.0005.

    before:  Constant f32 -> Convolution
    after:   Constant f16 -> Convert f32 (marked as decompression) -> Convolution
    """
    from openvino import opset13
    from openvino._offline_transformations import compress_model_transformation

    outputs = outputs_by_name(model)
    kept = [
        (node.data.copy(), node.friendly_name, node.output(0).get_names(), node.output(0).get_target_inputs())
        for site in sites
        for node in _scan_constants(outputs, site)
    ]
    compress_model_transformation(model)
    for data, name, tensor_names, readers in kept:
        constant = opset13.constant(data, name=name)
        constant.output(0).get_tensor().set_names(tensor_names)
        for reader in readers:
            reader.replace_source_output(constant.output(0))


def cut_out(model: Any, site: ScanSite) -> Any:
    """Return the nodes of one portable scan as a separate model: u, delta, B, C -> y. Changes `model`."""
    from openvino import Model, opset13

    outputs = outputs_by_name(model)
    parameters = []
    for key in SCAN_READS:
        out = outputs[site.reads[key]]
        parameter = opset13.parameter(out.partial_shape, out.element_type, name=key)
        parameter.output(0).get_tensor().set_names({key})
        for reader in out.get_target_inputs():
            reader.replace_source_output(parameter.output(0))
        parameters.append(parameter)
    y = outputs[site.writes]
    y.get_tensor().set_names({"y"})
    for node in _behind(y.get_node(), parameters):
        if node.get_type_name() == "ShapeOf":
            node.output(0).replace(_sizes(node, parameters[0]))
    return Model([y], parameters, site.name)


def _sizes(shape_of: Any, u: Any) -> Any:
    """Return the sizes that a ShapeOf reads, from constants and the batch of u.

    OpenVINO computes equal sizes of several scans once, so that a scan may read the shape of a tensor before another
    scan.
    """
    from openvino import opset13

    sizes, element = shape_of.input(0).get_partial_shape(), shape_of.output(0).get_element_type()
    if sizes.is_static:
        return opset13.constant([*sizes.to_shape()], element).output(0)
    known = opset13.constant([size.get_length() for size in [*sizes][1:]], element)
    batch = opset13.gather(opset13.shape_of(u, element), opset13.constant([0]), opset13.constant(0))
    return opset13.concat([batch, known], axis=0).output(0)


def describe(model: Any, facts: dict[str, str]) -> None:
    """Write `facts` into the model's metadata, in the section RT_INFO."""
    for key, value in sorted(facts.items()):
        model.set_rt_info(value, [RT_INFO, key])


def save(model: Any, path: Path, *, exact_results: bool = False) -> None:
    """Write `path` (.xml) and the .bin beside it. Constants keep their types. See `marked_precise`."""
    import openvino

    openvino.save_model(model, str(path), compress_to_fp16=False)
    ir = without_default(path.read_text(encoding="utf-8"))
    path.write_text(marked_precise(ir, results=exact_results), encoding="utf-8")


def without_default(ir: str) -> str:
    """Drop the scans' attribute delta_softplus where it has its default value, which OpenVINO always writes."""
    return re.sub(r'\s*<data delta_softplus="true"\s*/>', "", ir)


def marked_precise(ir: str, *, results: bool = False) -> str:
    """Mark the operators of our extension, and those that select detections, as precision sensitive in an IR's XML.

    OpenVINO's plugin for a device that computes in float16 then keeps these operators and their inputs in float32, with
    conversions around them. A float16 coordinate has steps of 1 pixel above 1024. Without the mark OpenVINO 2026.4.1
    passes float16 to our operators on CPUs with AVX512-FP16, and the model does not compile. OpenVINO's Python
    interface cannot set the mark. results: mark the model's outputs, too. Else they are rounded to float16 on the way.

    before:  <layer .. type="SelectiveScan" version="evm">
    after:   <layer .. type="SelectiveScan" version="evm"><rt_info><attribute name="precise" version="0" /></rt_info>
    """
    kinds = rf'version="evm"|name="{SELECTION}[./][^"]*"' + ('|type="Result"' if results else "")
    layer = rf"(<layer [^>]*\b(?:{kinds})[^>]*(?<!/)>)(\s*<data [^>]*/>)?"
    return re.sub(layer, r'\1\2<rt_info><attribute name="precise" version="0" /></rt_info>', ir)


def _scan_constants(outputs: dict[str, Any], site: ScanSite) -> Iterator[Any]:
    """Yield the float32 constants of a scan. For a portable scan: all constants between its inputs and its output."""
    if site.inside or "SelectiveScan" in outputs[site.writes].get_node().get_type_name():
        nodes = [outputs[site.reads[key]].get_node() for key in SCAN_CONSTANTS]
    else:
        ends = [outputs[site.reads[key]].get_node() for key in SCAN_READS]
        nodes = _behind(outputs[site.writes].get_node(), ends)
    for node in nodes:
        if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "f32":
            yield node


def _behind(node: Any, ends: Sequence[Any]) -> list[Any]:
    """Return `node` and every node that it depends on, up to `ends` and without them."""
    stop, found, waiting = {end.friendly_name for end in ends}, {}, [node]
    while waiting:
        node = waiting.pop()
        if node.friendly_name not in stop and node.friendly_name not in found:
            found[node.friendly_name] = node
            waiting += [value.get_node() for value in node.input_values()]
    return list(found.values())
