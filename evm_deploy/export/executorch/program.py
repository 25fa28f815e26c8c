"""Lowering of ONNX graphs of fixed sizes to programs of ExecuTorch (.pte), with XNNPACK for what it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evm_deploy._util.silence import silence_libraries
from evm_deploy._util.torch_settings import no_stack_traces
from evm_deploy.errors import EvmError, ToolchainError
from evm_deploy.runtimes.executorch import NAMES
from evm_deploy.scan.onnx_function import DOMAIN

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

DELEGATE = "executorch_call_delegate"


@dataclass(frozen=True)
class Program:
    """Lowered program.

    file: content of the .pte. delegates: parts that XNNPACK computes. operators: calls of kernels outside these parts,
    by the name of the operator. scans: names of the ONNX nodes of domain evm, in the order in which the program runs
    them, which may differ from that of the graph.
    """

    file: bytes
    delegates: int
    operators: dict[str, int]
    scans: tuple[str, ...]


def lower(model: onnx.ModelProto, *, portable: bool) -> Program:
    """Lower a graph of fixed sizes: methods `forward`, and NAMES for the names of inputs and outputs.

    portable: scans in standard operations. Raises UsageError for a node that has no form in ExecuTorch, ToolchainError
    if ExecuTorch fails.
    """
    with silence_libraries():
        import torch
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from torch.fx.traceback import preserve_node_meta

        from evm_deploy.export.executorch.module import GraphModule

        module = GraphModule(model, portable=portable).eval()
        names = "\n\n".join("\n".join(each) for each in (module.inputs, module.outputs))
        try:
            with no_stack_traces():
                with torch.no_grad(), preserve_node_meta():
                    program = torch.export.export(module, _examples(model), strict=False)
                edge = to_edge_transform_and_lower(
                    program,
                    partitioner=[XnnpackPartitioner()],
                    compile_config=EdgeCompileConfig(_check_ir_validity=False),  # it knows operators of torch alone
                    constant_methods={NAMES: names},
                )
                calls, scans = _calls(edge.exported_program()), _scans(edge.exported_program())
                delegates = calls.pop(DELEGATE, 0)
                return Program(bytes(edge.to_executorch().buffer), delegates, dict(sorted(calls.items())), scans)
        except EvmError:
            raise
        except Exception as error:  # of torch's tracer and ExecuTorch's passes
            cause = _evm_error(error)
            if cause:
                raise cause from error
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ToolchainError(
                f"ExecuTorch cannot lower the network: {why}", "report this, with the output of evm-doctor"
            ) from error


def _calls(program: Any) -> Counter[str]:
    """Count the calls of an exported program by operator, such as aten.mean.dim."""
    targets = [node.target for node in program.graph_module.graph.nodes if node.op == "call_function"]
    names = Counter(
        getattr(target, "_op", target).__name__ if hasattr(target, "__name__") else str(target) for target in targets
    )
    return Counter({name: count for name, count in names.items() if name != "getitem"})


def _scans(program: Any) -> tuple[str, ...]:
    """Return the names of the ONNX nodes that the calls of our operators come from, in order."""
    from evm_deploy.export.executorch.module import STEP

    nodes = program.graph_module.graph.nodes
    return tuple(node.meta["custom"][STEP] for node in nodes if getattr(node.target, "namespace", "") == DOMAIN)


def _examples(model: onnx.ModelProto) -> tuple[Tensor, ...]:
    """Return zeros for the inputs of a graph."""
    import torch

    from evm_deploy.export.executorch.operators import DTYPES

    constants = {tensor.name for tensor in model.graph.initializer}
    types = [value.type.tensor_type for value in model.graph.input if value.name not in constants]
    return tuple(torch.zeros([dim.dim_value for dim in each.shape.dim], dtype=DTYPES[each.elem_type]) for each in types)


def _evm_error(error: BaseException) -> EvmError | None:
    """Return the EvmError among the causes of an exception of torch, if any."""
    return next((each for each in _causes(error) if isinstance(each, EvmError)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__
