"""The selective scan as a model-local ONNX function of standard ops, for runtimes without a native kernel.

The function is one ONNX `Scan`, each iteration of which unrolls `block_steps` steps, for any shape and batch:

    dt = softplus(delta + bias), or delta + bias;  per block:  a = Exp(dt * A);  x = dt u B  (outer product);
    h_i = a_i * h_(i-1) + x_i  for each step;  y = C h  (one MatMul over the block's states)

L is padded after softplus: a padded step has dt = 0, decay 1 and inflow 0. States are (b, K, N, D), channels
innermost. The body reads no values from the outer graph (A is passed through as a state): some importers refuse a body
that does.
"""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, Any

import numpy as np

from evm_deploy._util.silence import one_at_a_time

if TYPE_CHECKING:
    import onnx

DOMAIN, OP_TYPE, VERSION = "evm", "SelectiveScan", 1
INPUTS = ("u", "delta", "A", "B", "C", "skip", "bias")
OUTPUT = "y"
SOFTPLUS = "delta_softplus"  # attribute of a node, written only where it is 0: then dt = delta + bias
BLOCK_STEPS = 7


def register_schema() -> None:
    """Register the schema of evm::SelectiveScan, for the ONNX checker and the exporter, once per process."""
    import onnx

    schema = onnx.defs.OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc="The Mamba-1 selective scan, channels last.",
        inputs=[onnx.defs.OpSchema.FormalParameter(name, "T") for name in INPUTS],
        outputs=[onnx.defs.OpSchema.FormalParameter(OUTPUT, "T")],
        type_constraints=[("T", ["tensor(float)"], "State and exp are float32.")],
        attributes=[
            onnx.defs.OpSchema.Attribute(SOFTPLUS, onnx.defs.OpSchema.AttrType.INT, required=False),
            # only TensorRT's parser reads these
            onnx.defs.OpSchema.Attribute("plugin_namespace", onnx.defs.OpSchema.AttrType.STRING, required=False),
            onnx.defs.OpSchema.Attribute("plugin_version", onnx.defs.OpSchema.AttrType.STRING, required=False),
            onnx.defs.OpSchema.Attribute("aot", onnx.defs.OpSchema.AttrType.INT, required=False),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer_like_u)
    with one_at_a_time:
        if not onnx.defs.has(OP_TYPE, DOMAIN):
            onnx.defs.register_schema(schema)
            # onnx before 1.23 would call the inference function after Python has ended, and crash
            atexit.register(onnx.defs.deregister_schema, OP_TYPE, VERSION, DOMAIN)


def _infer_like_u(context: Any) -> None:
    context.set_output_type(0, context.get_input_type(0))


class Body:
    """Builder that appends ONNX nodes and returns the names of their outputs. prefix: prefix of all new names."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node and return the name of its output, or the list of names if `outputs` is greater than 1."""
        from onnx import helper

        name = f"{self.prefix}{op_type}_{len(self.nodes)}"
        names = [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def write(self, op_type: str, inputs: list[str], output: str) -> None:
        """Append the last node, whose output is named `output`."""
        from onnx import helper

        name = f"{self.prefix}{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name))

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        """Append a Constant node with `value` and return the name of its output."""
        from onnx import numpy_helper

        return str(self.op("Constant", value=numpy_helper.from_array(np.array(value, dtype))))

    def dim(self, tensor: str, axis: int) -> str:
        """Append nodes that read the size of an axis, shape (1), and return the name of the result."""
        return str(self.op("Gather", self.op("Shape", tensor), self.const([axis])))

    def reshape(self, tensor: str, *dims: str) -> str:
        """Append nodes that reshape `tensor`; each of `dims` names a 1-D int64 tensor of sizes."""
        return str(self.op("Reshape", tensor, self.op("Concat", *dims, axis=0)))


def has_softplus(node: onnx.NodeProto) -> bool:
    """Test whether a scan node computes dt with softplus, as all do whose attribute `delta_softplus` is not 0."""
    return all(attribute.i for attribute in node.attribute if attribute.name == SOFTPLUS)


def add_functions(model: onnx.ModelProto, opset: int) -> None:
    """Append the portable body of the model's scans, in place. A model without scans gets the body as well.

    If there are scans of both kinds, those without softplus call an overload of the function.
    """
    import onnx

    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    plain = [node for node in nodes if not has_softplus(node)]
    if len(plain) < len(nodes) or not nodes:
        model.functions.append(selective_scan_function(opset))
    if plain:
        function = selective_scan_function(opset, softplus=False)
        if len(plain) < len(nodes):
            function.overload = SOFTPLUS
            model.ir_version = max(model.ir_version, onnx.IR_VERSION_2024_3_25)
        for node in plain:
            node.overload = function.overload
        model.functions.append(function)


def selective_scan_function(opset: int, block_steps: int = BLOCK_STEPS, *, softplus: bool = True) -> onnx.FunctionProto:
    """Return the function evm::SelectiveScan for models that import the default domain at `opset`.

    softplus: False for nodes with the attribute delta_softplus=0.
    opset: at least 18, for Split. The ONNX checker refuses a function whose opset differs from the model's, so the
    function is built per model. The nodes are named SelectiveScan/..; profiles show these names even where a runtime
    or an exporter has inlined the function.
    """
    from onnx import helper

    f = Body(f"{OP_TYPE}/")
    zero, one, two, steps = f.const([0]), f.const([1]), f.const([2]), f.const([block_steps])
    batch, L, K, N, D = f.dim("u", 0), f.dim("u", 2), f.dim("A", 0), f.dim("A", 2), f.dim("A", 1)
    dt = f.op("Add", "delta", f.op("Unsqueeze", "bias", one))
    if softplus:
        dt = softplus_series(f, dt)

    missing = f.op("Mod", f.op("Sub", steps, f.op("Mod", L, steps)), steps)
    # Pads for all axes: ONNX Runtime 1.32 moves a Transpose through a Pad and ignores the Pad's `axes`, then fails.
    pads = f.op("Concat", f.const([0] * 6), missing, zero, axis=0)
    blocks = f.op("Div", f.op("Add", L, missing), steps)

    def by_block(tensor: str, *dims: str) -> str:  # (b, K, L, X) -> (blocks, steps, b, K, *dims)
        padded = f.op("Pad", tensor, pads)
        return f.reshape(f.op("Transpose", padded, perm=[2, 0, 1, 3]), blocks, steps, batch, K, *dims)

    h0 = f.op("Expand", f.const(0, np.float32), f.op("Concat", one, batch, K, N, D, axis=0))
    A = f.op("Unsqueeze", f.op("Transpose", "A", perm=[0, 2, 1]), f.const([0, 1]))
    inflow = f.op("Mul", dt, "u")
    _, _, y = f.op(
        "Scan",
        *(h0, A, by_block(dt, one, D), by_block(inflow, one, D), by_block("B", N, one), by_block("C", one, N)),
        outputs=3,
        body=_block_graph(block_steps),
        num_scan_inputs=4,
    )
    y = f.op("Transpose", f.reshape(y, f.const([-1]), batch, K, D), perm=[1, 2, 0, 3])
    y = f.op("Slice", y, zero, L, two)
    skipped = f.op("Mul", "u", f.op("Unsqueeze", "skip", one))
    f.write("Add", [y, skipped], OUTPUT)
    opsets, attributes = [helper.make_opsetid("", opset)], [] if softplus else [SOFTPLUS]
    return helper.make_function(DOMAIN, OP_TYPE, INPUTS, [OUTPUT], f.nodes, opsets, attributes)


def softplus_series(f: Body, x: str) -> str:
    """Append `portable.softplus_series` as ONNX nodes and return the name of the result.

    ONNX Runtime's Softplus and Log are slow; OpenVINO's lose small deltas.
    """
    e = f.op("Exp", f.op("Neg", f.op("Abs", x)))
    s = f.op("Div", e, f.op("Add", e, f.const(2, np.float32)))
    square, series = f.op("Mul", s, s), f.const(2 / 13, np.float32)
    for k in (11, 9, 7, 5, 3, 1):
        series = f.op("Add", f.op("Mul", series, square), f.const(2 / k, np.float32))
    return str(f.op("Add", f.op("Relu", x), f.op("Mul", series, s)))


def _block_graph(block_steps: int) -> onnx.GraphProto:
    """Return the body of the Scan, `block_steps` steps of the recurrence.

    The states are h and A. The scan inputs are dt and inflow (steps, b, K, 1, D), B (.., N, 1) and C (.., 1, N).
    """
    from onnx import TensorProto, helper

    node, steps = helper.make_node, range(block_steps)
    nodes = [
        node("Mul", ["dt", "A"], ["exponent"]),
        node("Exp", ["exponent"], ["decay"]),
        node("MatMul", ["B", "inflow"], ["x"]),
        node("Split", ["decay"], [f"a{i}" for i in steps], axis=0, num_outputs=block_steps),
        node("Split", ["x"], [f"x{i}" for i in steps], axis=0, num_outputs=block_steps),
    ]
    h = "h"
    for i in steps:
        nodes += [node("Mul", [f"a{i}", h], [f"kept{i}"]), node("Add", [f"kept{i}", f"x{i}"], [f"h{i}"])]
        h = f"h{i}"
    nodes += [
        node("Concat", [f"h{i}" for i in steps], ["states"], axis=0),
        node("MatMul", ["C", "states"], ["y"]),
        node("Identity", [h], ["h_out"]),
        node("Identity", ["A"], ["A_out"]),
    ]

    def infos(*names: str) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 5) for name in names]

    return helper.make_graph(
        nodes, "scan_block", infos("h", "A", "dt", "inflow", "B", "C"), infos("h_out", "A_out", "y")
    )
