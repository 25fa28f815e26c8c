"""ONNX graphs of fixed sizes as torch modules, with our operators as custom ops of torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.traceback import annotate

from evm_deploy.errors import UsageError
from evm_deploy.export.executorch.operators import OPERATORS, Operator
from evm_deploy.export.executorch.quantized import LINEAR
from evm_deploy.export.executorch.rounding import dequantize_weight
from evm_deploy.export.executorch.torch_ops import define_out_of_scan, fused_op
from evm_deploy.scan.fused import OP_TYPES
from evm_deploy.scan.onnx_function import DOMAIN, OP_TYPE, SOFTPLUS
from evm_deploy.scan.op import selective_scan
from evm_deploy.scan.portable import two_level_scan

if TYPE_CHECKING:
    import onnx

STEP = "step"  # key of a traced node's metadata, for the name of the ONNX node that it comes from
HINT = "report this, with the name of the network; other targets may take it"


@dataclass(frozen=True)
class Step:
    """A node. inputs: names of tensors, or the values of constants that only choose a form. attributes: by name."""

    name: str
    kind: str
    function: Callable[..., Any]
    inputs: Sequence[Any]
    attributes: dict[str, Any]
    outputs: Sequence[str]

    def run(self, values: dict[str, Tensor]) -> None:
        """Compute the outputs into `values`. Raises UsageError for a form of the operator that has no function."""
        given = [values[each] if isinstance(each, Named) else each for each in self.inputs]
        try:
            with annotate({STEP: self.name}):
                result = self.function(*given, **self.attributes)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"{self.name} ({self.kind}) has no form in ExecuTorch: {why}", HINT) from error
        results = result if isinstance(result, (tuple, list)) else (result,)
        values.update({name: value for name, value in zip(self.outputs, results, strict=False) if name})


class Named(str):
    """Name of a tensor among the values of a run."""


class GraphModule(nn.Module):
    """Module that computes an ONNX graph: its inputs in order -> its outputs in order.

    portable: scans are standard operations, without our operators. Functions of the model are not read. Raises
    UsageError naming a node whose operator has no function, or whose form depends on values.
    """

    def __init__(self, model: onnx.ModelProto, *, portable: bool) -> None:
        super().__init__()
        from onnx import numpy_helper

        graph = model.graph
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in constants]
        self.outputs = [value.name for value in graph.output]
        self.steps: list[Step] = []
        self.held: dict[str, str] = {}  # constant -> attribute of this module
        for node in graph.node:
            if node.op_type == "Constant" and not node.domain:
                constants[node.output[0]] = _constant(node)
                continue
            operator = _operator(node, portable, constants)
            inputs = [self._input(node, i, name, operator, constants) for i, name in enumerate(node.input)]
            while inputs and inputs[-1] is None:
                inputs.pop()
            attributes = {} if node.domain == DOMAIN else _attributes(node)
            self.steps.append(Step(node.name, node.op_type, operator.function, inputs, attributes, list(node.output)))
        for name in self.outputs:
            if name in constants:
                self._hold(name, constants[name])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs."""
        values = {Named(name): value for name, value in zip(self.inputs, inputs, strict=True)}
        values.update({Named(name): getattr(self, attribute) for name, attribute in self.held.items()})
        for step in self.steps:
            step.run(values)  # type: ignore[arg-type]
        return tuple(values[Named(name)] for name in self.outputs)

    def _input(
        self, node: onnx.NodeProto, index: int, name: str, operator: Operator, constants: dict[str, NDArray[Any]]
    ) -> Any:
        if not name:
            return None
        if index in operator.static:
            if name not in constants:
                raise UsageError(
                    f"{node.name} ({node.op_type}) reads {name}, which depends on the image: the program of ExecuTorch "
                    "has fixed sizes",
                    HINT,
                )
            return constants[name].tolist()
        if name in constants:
            self._hold(name, constants[name])
        return Named(name)

    def _hold(self, name: str, value: NDArray[Any]) -> None:
        """Keep a constant as a parameter, or as a buffer if it has no gradient."""
        if name not in self.held:
            self.held[name] = attribute = f"c{len(self.held)}"
            tensor = torch.from_numpy(np.array(value))
            if tensor.is_floating_point():
                self.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(attribute, tensor)


def _operator(node: onnx.NodeProto, portable: bool, constants: Collection[str]) -> Operator:
    """Return the function of a node. Raises UsageError for an operator that has none."""
    if node.domain == DOMAIN and node.op_type == OP_TYPE:
        softplus = next((bool(attribute.i) for attribute in node.attribute if attribute.name == SOFTPLUS), True)
        if portable:
            return Operator(lambda *tensors: two_level_scan(*tensors, delta_softplus=softplus))
        define_out_of_scan()
        return Operator(lambda *tensors: selective_scan(*tensors, softplus))
    if node.domain == DOMAIN and node.op_type in OP_TYPES:
        compute = fused_op(node.op_type)
        return Operator(lambda x, *operands: compute(x, list(operands)))
    if node.domain == DOMAIN and node.op_type == LINEAR:
        return Operator(F.linear)
    if node.op_type == "DequantizeLinear" and node.input[0] in constants:
        return Operator(dequantize_weight)
    if node.domain or node.op_type not in OPERATORS:
        raise UsageError(f"{node.name}: the operator {node.op_type} has no form in ExecuTorch", HINT)
    return OPERATORS[node.op_type]


def _constant(node: onnx.NodeProto) -> NDArray[Any]:
    from onnx import helper, numpy_helper

    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if attribute.name == "value" else np.array(value)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes of a node as numbers, lists and text."""
    from onnx import helper

    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
