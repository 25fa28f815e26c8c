"""Ready-made ONNX files as networks: the float model is the file itself, computed node by node.

Nodes are computed by ONNX's reference evaluator, in numpy; convolutions in torch, which is faster; scans by the op
evm::selective_scan. Neither ONNX Runtime nor any of our passes takes part, so that an artifact is compared with
something else than itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evm_deploy.errors import CheckpointError, UsageError
from evm_deploy.model.foreign.look import reason
from evm_deploy.model.foreign.scan import scan
from evm_deploy.model.graph_file import GraphFile
from evm_deploy.model.network import Network
from evm_deploy.scan.op import selective_scan
from evm_deploy.scan.portable import two_level_scan

if TYPE_CHECKING:
    import onnx

SOFTPLUS = "delta_softplus"
STANDARD = ("", "ai.onnx", "ai.onnx.ml")
HINT = "export the network itself: evm-export --model"
DEFAULT_SIDE = 224
RENAMED = ("evm.ready", "ScanOfOthers")  # domain and type of scan nodes within the evaluator


def ready_network(file: GraphFile, imgsz: tuple[int, int] | None = None) -> Network:
    """Read an ONNX file and return its network. imgsz: (H, W) of a file whose input has no fixed size.

    Raises CheckpointError for a file that is not ONNX, and UsageError for a graph that is no network of images, has
    nodes of an unknown domain, or cannot be computed.
    """
    model, digest = _read(Path(file.path))
    module = ReadyGraph(model, file.scan_ops)
    size = tuple(side or asked for side, asked in zip(module.size, imgsz or (DEFAULT_SIDE,) * 2, strict=True))
    if imgsz and size != imgsz:
        fixed = "x".join(map(str, size))
        raise UsageError(f"the graph of {file.path} takes images of {fixed}", "leave --imgsz out")
    network = Network.of(
        module,
        torch.rand(module.batch or 1, 3, *size, generator=torch.Generator().manual_seed(0)),
        outputs=file.outputs,
        task=file.task,
        name=Path(file.path).stem,
        notes=[f"made of the ONNX file {Path(file.path).name}, whose own nodes are the float model"],
    )
    spec = replace(
        network.spec,
        blocks=tuple(dict.fromkeys(filter(None, map(_block, model.graph.node)))),
        defaults=network.spec.defaults if all(module.size) or imgsz else {},
        family="ONNX",
        parameters=sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer),
        checkpoint={"file": Path(file.path).name, "sha256": digest, "container": "onnx", "dropped": []},
    )
    return Network(module, spec)


def path_of(node: onnx.NodeProto) -> str:
    """Return the module path in a node's name: layers.0.mlp.fc1 of /layers.0/mlp/fc1/MatMul, empty for node_Conv_12."""
    return ".".join(part for part in node.name.strip("/").split("/")[:-1] if part)


def _block(node: onnx.NodeProto) -> str:
    """Return the path of a node up to its second number, such as layers.0.blocks.1; empty without a number."""
    parts = path_of(node).split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()][:2]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ""


def _read(path: Path) -> tuple[onnx.ModelProto, str]:
    """Return the model of a file, with external data, and the SHA-256 of its content."""
    import onnx

    try:
        model = onnx.load(str(path))
    except Exception as error:  # of protobuf, or a validation of external data
        raise CheckpointError(f"{path} cannot be read as an ONNX file: {reason(error)}") from error
    if not model.graph.node:
        raise CheckpointError(f"{path} cannot be read as an ONNX file: it holds no graph")
    return model, hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


class ReadyGraph(nn.Module):
    """An ONNX graph as a module: images (b, 3, H, W) -> {output name: tensor}, a single one of rank 2 as `logits`.

    model: the graph as it is in the file. scan_ops: (domain, type) of its scan nodes. size: (H, W) of its input, 0 for
    a side that is not fixed. batch: its fixed batch, else 0.
    """

    def __init__(self, model: onnx.ModelProto, scan_ops: frozenset[tuple[str, str]]) -> None:
        super().__init__()
        self.model, self.scan_ops = model, scan_ops
        constants = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in constants]
        kind = inputs[0].type.tensor_type if inputs else None
        shape = [each.dim_value for each in kind.shape.dim] if kind else []
        if len(inputs) != 1 or len(shape) != 4 or shape[1] not in (0, 3) or kind is None or kind.elem_type != 1:
            given = ", ".join(f"{value.name} {_shape(value)}" for value in inputs) or "none"
            raise UsageError(
                f"the graph has the inputs {given}: an artifact takes one, float32 images (b, 3, H, W)", HINT
            )
        self.input_name, self.batch, self.size = inputs[0].name, shape[0], (shape[2], shape[3])
        self._check_nodes()
        self.evaluator: Any = None

    def _check_nodes(self) -> None:
        functions = {(each.domain, each.name) for each in self.model.functions}
        for node in self.model.graph.node:
            kind = (node.domain, node.op_type)
            if kind in self.scan_ops:
                if not 5 <= len(node.input) <= 7 or not all(node.input[:5]):
                    raise UsageError(
                        f"scan node {node.name or node.output[0]} has {len(node.input)} inputs: u, delta, A, B, C, and "
                        "where given D and the bias of delta, are known",
                        HINT,
                    )
                if SOFTPLUS not in {attribute.name for attribute in node.attribute}:
                    raise UsageError(
                        f"scan node {node.name or node.output[0]} has no attribute {SOFTPLUS}",
                        "add it, 1 if the node computes dt by softplus, else 0",
                    )
            elif node.domain not in STANDARD and kind not in functions:
                raise UsageError(
                    f"node {node.name or node.output[0]} is {node.domain}::{node.op_type}, which is not known here",
                    "if it is a selective scan, name it: --scan-op DOMAIN::TYPE",
                )

    def forward(self, x: Tensor) -> Any:
        """Compute the graph, in parts of its own batch. The scans of the first part run as the op."""
        size = self.batch or len(x)
        parts = [self._run(x[i : i + size], first=i == 0) for i in range(0, len(x), size)]
        outputs = {
            value.name: torch.cat([part[i] for part in parts]) for i, value in enumerate(self.model.graph.output)
        }
        only = next(iter(outputs.values()))
        return {"logits": only} if len(outputs) == 1 and only.dim() == 2 else outputs

    def _run(self, x: Tensor, first: bool) -> list[Tensor]:
        if self.evaluator is None:
            from onnx.reference import ReferenceEvaluator

            self.evaluator = ReferenceEvaluator(self._renamed(), new_ops=[_scan_class(self), _convolution()])
        self.as_op = first
        if self.batch and len(x) < self.batch:
            raise UsageError(f"the graph takes {self.batch} images at once", "export the network with a batch of 1")
        found = self.evaluator.run(None, {self.input_name: x.numpy()})
        return [torch.tensor(value) for value in found]

    def _renamed(self) -> onnx.ModelProto:
        """Return the model with scans of one name: the evaluator takes a `my.ops::Scan` for ONNX's own Scan."""
        from onnx import helper

        model = type(self.model)()
        model.CopyFrom(self.model)
        for node in model.graph.node:
            if (node.domain, node.op_type) in self.scan_ops:
                node.domain, node.op_type = RENAMED
        model.opset_import.append(helper.make_opsetid(RENAMED[0], 1))
        return model


def _shape(value: onnx.ValueInfoProto) -> list[Any]:
    return [each.dim_value or each.dim_param or "?" for each in value.type.tensor_type.shape.dim]


def _scan_class(module: ReadyGraph) -> type:
    """Return a class of the reference evaluator that computes the scans of others."""
    from onnx.reference.op_run import OpRun

    def run(self: Any, *inputs: Any, **attributes: Any) -> tuple[Any]:
        tensors: list[Any] = [None if value is None else torch.tensor(value) for value in inputs]
        u, delta, A, B, C, *more = tensors
        D, bias = (*more, None, None)[:2]
        softplus = bool(attributes.get(SOFTPLUS, getattr(self, SOFTPLUS, None)))
        op: Any = selective_scan if module.as_op else two_level_scan
        return (scan(u, delta, A, B, C, D, None, bias, softplus, op).numpy(),)

    return type(RENAMED[1], (OpRun,), {"op_domain": RENAMED[0], "_run": run})


def _convolution() -> type:
    """Return a class of the reference evaluator that computes convolutions in torch."""
    from onnx.reference.op_run import OpRun

    def run(
        self: Any,
        x: Any,
        w: Any,
        b: Any = None,
        auto_pad: Any = None,
        dilations: Any = None,
        group: Any = None,
        kernel_shape: Any = None,
        pads: Any = None,
        strides: Any = None,
    ) -> tuple[Any]:
        axes = x.ndim - 2
        if auto_pad not in (None, "NOTSET", "VALID"):
            raise UsageError(f"a Conv with auto_pad {auto_pad} has no float model here", HINT)
        pads = list(pads or [0] * 2 * axes)
        around = [side for axis in reversed(range(axes)) for side in (pads[axis], pads[axis + axes])]
        x, w = (torch.tensor(value) for value in (x, w))
        b = None if b is None else torch.tensor(b)
        call = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        ones = [1] * axes
        y = call(F.pad(x, around), w, b, tuple(strides or ones), 0, tuple(dilations or ones), group or 1)
        return (y.numpy(),)

    return type("Conv", (OpRun,), {"op_domain": "", "_run": run})
