"""Hub graph: the ONNX graph, traced once from a torch module, that every ONNX-based target starts from."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from evm_deploy._util.packages import install_hint
from evm_deploy._util.silence import silence_libraries
from evm_deploy._util.torch_settings import no_stack_traces
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import EvmError, ToolchainError, UsageError
from evm_deploy.export.hub.attention import attention_translations
from evm_deploy.export.hub.decompositions import copied_decompositions
from evm_deploy.export.hub.fold_batch_norm import fold_batch_norm
from evm_deploy.export.hub.fuse import match_constants
from evm_deploy.export.hub.merge_moves import merge_moves
from evm_deploy.export.hub.naming import call_name, name_after_modules, name_after_neighbours, name_values_after_nodes
from evm_deploy.export.hub.pooling import pooling_translations
from evm_deploy.export.hub.ready import hub_graph
from evm_deploy.export.hub.regions import region_translations
from evm_deploy.export.hub.scatter import scatter_translations
from evm_deploy.export.hub.suppression import nms_translations
from evm_deploy.export.hub.torchlib import unparsed_torchlib
from evm_deploy.export.plan import DEFAULT_OPSET, ExportPlan
from evm_deploy.model.network import Network
from evm_deploy.scan import onnx_function
from evm_deploy.scan.fused import SCAN_OUTPUTS, FusedOp, fusable_modules
from evm_deploy.tasks import get_task
from evm_deploy.tasks.classification import LOGITS, PROBABILITIES

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

SCAN_INPUTS = onnx_function.INPUTS
INSTALL_HINT = install_hint("onnx")
ROOT = "model"  # attribute of the wrapped module that holds the network


@dataclass(frozen=True)
class ScanSite:
    """Location of one scan in a graph: its module path, and the names of the tensors that it reads and writes.

    inside: name of the fused node that holds the scan, if any. The tensors u, delta, B, C and y of such a scan exist
    only after the node's optional outputs have been given these names.
    """

    name: str
    reads: dict[str, str]
    writes: str
    inside: str = ""


@dataclass
class Graph:
    """The hub graph: float32, with one evm::SelectiveScan node per scan and a function with the scan's portable body.

    fusable: module path -> the op that a target may replace the module by.
    """

    model: onnx.ModelProto
    fusable: dict[str, FusedOp] = field(default_factory=dict)

    @property
    def scans(self) -> tuple[ScanSite, ...]:
        """Scans of the graph in execution order."""
        return scan_sites(self.model)

    @property
    def sha256(self) -> str:
        """SHA-256 of the model, which traces of the same network share."""
        return hashlib.sha256(self.model.SerializeToString(deterministic=True)).hexdigest()


def scan_sites(model: onnx.ModelProto, fused: Mapping[str, FusedOp] | None = None) -> tuple[ScanSite, ...]:
    """Return the scans of `model` in execution order. fused: module path -> op, for modules that are one node.

    A scan is named after its module; the second call of the same module is `path#2`.
    """
    sites: list[ScanSite] = []
    calls: Counter[str] = Counter()
    for node in model.graph.node:
        path, _, op_type = node.name.rpartition("/")
        if (node.domain, node.op_type) == (onnx_function.DOMAIN, onnx_function.OP_TYPE):
            reads = dict(zip(SCAN_INPUTS, node.input, strict=True))
            sites.append(ScanSite(call_name(path, calls), reads, node.output[0]))
        elif fused and path in fused and op_type in {fused[path].op_type, *fused[path].int8_types.values()}:
            op, name = fused[path], f"{path}.{fused[path].scan}"
            function = next(f for f in model.functions if (f.name, f.overload) == (op_type, node.overload))
            operands = dict(zip(function.input, node.input, strict=True))
            reads = {key: operands[operand] for key, operand in op.scan_constants.items()}
            written = {key: f"{name}/{key}" for key in SCAN_OUTPUTS}
            sites.append(ScanSite(name, {**reads, **written}, written["y"], node.name))
    return tuple(sites)


def scan_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model of one evm::SelectiveScan node: seven inputs of any size, with the portable body from `model`."""
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


class WrappedNetwork(Protocol):
    """The float model as exported, a torch module in eval mode.

    outputs: names of its outputs, in order. channels: number of channels of its input.
    """

    outputs: tuple[str, ...]
    channels: int


def with_pre_and_postprocessing(network: Network, plan: ExportPlan, preprocessing: Preprocessing) -> Any:
    """Wrap a network with its preprocessing (for `--input image`) and the chosen head. Returns a WrappedNetwork.

    The result is the module that is traced, and the reference of every parity check.
    """
    import torch
    from torch import nn

    from evm_deploy.model.foreign.look import named_tensors
    from evm_deploy.model.foreign.running import foreign_code

    probabilities, selects = plan.head == PROBABILITIES, get_task(network.spec.task).selects

    def probabilities_of(logits: Tensor) -> Tensor:
        independent = plan.multi_label or logits.shape[-1] == 1
        return torch.sigmoid(logits) if independent else torch.softmax(logits, dim=-1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network.module
            self.outputs = tuple(
                PROBABILITIES if probabilities and name == LOGITS else name for name in network.spec.outputs
            )
            if selects:  # the maps of a detector or segmenter -> detections or a label map
                module: Any = network.module
                if not hasattr(module, "selection"):
                    raise UsageError(
                        f"{network.spec.name} has the task {network.spec.task}, but no method `selection`",
                        "leave the task out: the artifact then gives the network's own tensors",
                    )
                self.selection = module.selection(plan.selection, preprocessing.size)
                self.outputs = self.selection.outputs
            self.channels = preprocessing.channels
            mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
            self.scale = nn.Buffer(1 / (255 * std), persistent=False)
            self.shift = nn.Buffer(-mean / std, persistent=False)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            if plan.input == "image":  # uint8 NHWC -> normalised float32 NCHW
                x = (x.to(torch.float32) * self.scale + self.shift).permute(0, 3, 1, 2)
            with foreign_code():
                values = [value for _, value in named_tensors(self.model(x))]
            if selects:
                values = list(self.selection(*values))
            if len(values) != len(self.outputs):
                names = ", ".join(self.outputs)
                raise UsageError(f"{network.spec.name} returns {len(values)} tensors, but its outputs are {names}")
            given = [
                probabilities_of(value) if name == PROBABILITIES else value
                for name, value in zip(self.outputs, values, strict=True)
            ]
            for i, value in enumerate(
                given
            ):  # each output is a value of its own, also of a tensor that is returned twice
                if any(value is one for one in given[:i]):
                    given[i] = value.clone()
            return tuple(given)

    return Model().eval()


def input_shape(plan: ExportPlan, batch: int, channels: int) -> tuple[int, ...]:
    """Return the artifact's input shape for `batch` images: (batch, H, W, channels), or (batch, channels, H, W)."""
    if plan.imgsz is None:
        raise ValueError("the plan has not been completed")
    return (batch, *plan.imgsz, channels) if plan.input == "image" else (batch, channels, *plan.imgsz)


def trace_key(plan: ExportPlan) -> tuple[Any, ...]:
    """Return the settings of a plan that decide the hub graph. Plans with equal keys share one trace."""
    return plan.imgsz, plan.batch, plan.input, plan.head, plan.multi_label, plan.selection, plan.opset


def trace(model: Any, plan: ExportPlan, metadata: dict[str, str]) -> Graph:
    """Trace a module of `with_pre_and_postprocessing` to the hub graph. The same module and plan give the same bytes.

    Steps: torch.export with the scan as one op; BatchNorm folded; nodes and values named after module paths; the
    portable body added as a local function; onnxsim; chains of moves merged; the oldest IR version that the opset
    allows; full check; metadata. Raises ToolchainError if a package is missing or a step fails, UsageError for a
    network that has no ONNX graph.
    """
    graph = _trace(model, plan)
    for key in sorted(metadata):
        graph.model.metadata_props.add(key=key, value=metadata[key])
    graph.model.producer_name, graph.model.producer_version = "evm-deploy", metadata.get("evm_deploy", "")
    return graph


def _trace(model: Any, plan: ExportPlan) -> Graph:
    """Make the hub graph without metadata."""
    from evm_deploy.model.foreign.ready import ReadyGraph

    try:
        import onnx

        fusable = {path.removeprefix(f"{ROOT}."): op for path, op in fusable_modules(model)}
        if isinstance(network := getattr(model, ROOT, None), ReadyGraph):
            proto = hub_graph(network, model, plan)
        else:
            proto = _export(model, plan)
            name_after_modules(proto, root=ROOT)
        onnx_function.add_functions(proto, plan.opset or DEFAULT_OPSET)
        proto = _simplify(proto)
        name_after_neighbours(proto)
        merge_moves(proto, fusable)
        name_values_after_nodes(proto)
        proto.ir_version = onnx.helper.find_min_ir_version_for(list(proto.opset_import), ignore_unknown=True)
    except ImportError as error:
        raise ToolchainError(f"{error.name} is not installed", INSTALL_HINT) from error
    check(proto)
    names = {value.data_ptr(): name.removeprefix(f"{ROOT}.") for name, value in model.named_parameters()}
    return Graph(proto, {path: match_constants(proto, path, op, names) for path, op in fusable.items()})


def _export(model: Any, plan: ExportPlan) -> onnx.ModelProto:
    import onnxscript
    import torch

    from evm_deploy.scan import op  # noqa: F401  registers evm::selective_scan

    onnx_function.register_schema()
    evm = onnxscript.values.Opset(onnx_function.DOMAIN, onnx_function.VERSION)

    def selective_scan(
        u: Any, delta: Any, A: Any, B: Any, C: Any, skip: Any, bias: Any, delta_softplus: bool = True
    ) -> Any:
        attributes = {} if delta_softplus else {onnx_function.SOFTPLUS: 0}
        return evm.SelectiveScan(u, delta, A, B, C, skip, bias, **attributes)

    dtype = torch.uint8 if plan.input == "image" else torch.float32
    batch = plan.batch.min if plan.batch.static else max(2, plan.batch.min)
    example = torch.zeros(input_shape(plan, batch, model.channels), dtype=dtype)
    dynamic = None
    if not plan.batch.static:
        dynamic = ({0: torch.export.Dim("batch", min=plan.batch.min, max=plan.batch.max)},)
    try:
        with silence_libraries(), no_stack_traces(), unparsed_torchlib(), copied_decompositions():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=plan.opset or DEFAULT_OPSET,
                input_names=[plan.input],
                output_names=list(model.outputs),
                dynamic_shapes=dynamic,
                custom_translation_table={
                    torch.ops.evm.selective_scan.default: selective_scan,
                    **scatter_translations(plan.opset or DEFAULT_OPSET),
                    **pooling_translations(plan.opset or DEFAULT_OPSET),
                    **nms_translations(plan.opset or DEFAULT_OPSET),
                    **region_translations(plan.opset or DEFAULT_OPSET),
                    **attention_translations(plan.opset or DEFAULT_OPSET),
                },
                optimize=False,  # done below: the exporter's folding would name convolutions after their norms
            )
    except EvmError:
        raise
    except Exception as error:  # of torch's tracer, on code of others
        raise _not_traceable(error, model, example) from error
    if program is None:
        raise ToolchainError(
            f"torch.onnx.export of torch {torch.__version__} returned nothing",
            "install the versions of torch and onnxscript in constraints.txt",
        )
    fold_batch_norm(program.model)
    with silence_libraries():
        program.optimize()
    proto: onnx.ModelProto = program.model_proto
    return proto


def _not_traceable(error: Exception, model: Any, example: Tensor) -> EvmError:
    """Return the reason why torch cannot trace a network, with the place in its code."""
    from evm_deploy.model.foreign.look import innermost, place_of, reason

    cause = innermost(error)
    if isinstance(cause, EvmError):
        return cause
    if missing := re.match(r"No ONNX function found for <OpOverload\(op='(.+?)'", str(cause)):
        return UsageError(
            f"the network calls {missing[1]}{place_of(missing[1], model, example)}, which has no ONNX function",
            "write it with other operations of torch",
        )
    why = reason(error)
    if "data-dependent" in why.lower():
        return UsageError(
            f"the network's path depends on the values of its input: {why}",
            "an artifact has one path: use torch.where, or a constant in place of the condition",
        )
    return ToolchainError(f"torch cannot trace the network: {why}", "report this, with the output of evm-doctor")


def _simplify(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and infer shapes with onnxsim. Raises ToolchainError if onnxsim loses a scan or the function."""
    import onnxsim

    before = len(scan_sites(proto))
    with silence_libraries():
        simplified, _ = onnxsim.simplify(proto)
    if len(scan_sites(simplified)) != before or not simplified.functions:
        raise ToolchainError(
            f"onnxsim {onnxsim.__version__} lost scans of the graph", "report this, with the output of evm-doctor"
        )
    result: onnx.ModelProto = simplified
    return result


def check(proto: onnx.ModelProto) -> None:
    """Run the full ONNX check, shape inference included. Raises ToolchainError for an invalid graph."""
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        what = " ".join(str(error).split())
        raise ToolchainError(
            f"the exported graph is not valid ONNX: {what}", "report this, with the output of evm-doctor"
        ) from error
