"""Conversion of a torch module to an mlprogram, with our scan, and with inputs and outputs that suit apps."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from evm_deploy._util.silence import silence_libraries
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.coreml.coremltools_patch import converter, exact_pipeline, rarely_checked
from evm_deploy.export.coreml.fold_batch_norm import fold_batch_norm, module_path
from evm_deploy.export.coreml.suppression import INTEGERS, half_precision, register_suppression
from evm_deploy.export.hub import float16
from evm_deploy.export.hub import graph as hub
from evm_deploy.export.hub.graph import ROOT, ScanSite
from evm_deploy.export.hub.naming import call_name
from evm_deploy.export.plan import ExportPlan
from evm_deploy.scan import mil

if TYPE_CHECKING:
    from torch import Tensor, nn

OP = "evm::selective_scan"
DEFAULT_MIN_TARGET = "iOS17"
TENSOR_INPUT = "input_tensor"  # `tensor` is a reserved word of MIL
PROBABILITIES = "classLabel_probs"  # coremltools' name of a classifier's second output

_scan_paths: ContextVar[Iterator[str]] = ContextVar("scan_paths")


@dataclass(frozen=True)
class MlProgram:
    """A network as a Core ML program before it is saved, the counterpart of the hub graph.

    model: coremltools' MLModel. float_module: the torch module that was converted. scans: in execution order, named
    after modules. modules: weight name in the program -> module path. more: image size (H, W) -> the same network for
    this size.
    """

    model: Any
    float_module: nn.Module
    scans: tuple[ScanSite, ...]
    modules: Mapping[str, str]
    more: Mapping[tuple[int, int], MlProgram] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """SHA-256 of the program without its weights, which conversions of the same network share."""
        return hashlib.sha256(self.model.get_spec().SerializeToString(deterministic=True)).hexdigest()


def trace_key(plan: ExportPlan) -> tuple[Any, ...]:
    """Return the settings of a plan that decide the program. Plans with equal keys share one trace."""
    return *hub.trace_key(plan), plan.more_imgsz, plan.min_target, plan.precision == "fp32", plan.labels


def trace(module: Any, plan: ExportPlan, metadata: Mapping[str, str]) -> MlProgram:
    """Convert a module to a program for each image size of the plan: float32 for precision fp32, else float16.

    Raises ToolchainError if coremltools fails, and UsageError for an operation that it does not convert, or a weight
    that float16 cannot hold.
    """
    import torch

    from evm_deploy.model.segmentation import LabelSelection

    with silence_libraries():
        folded = fold_batch_norm(channels_first(module, plan), example(plan, module.channels))
    for each in folded.modules():
        if isinstance(each, LabelSelection):
            each.dtype = torch.int32  # Core ML has no arrays of uint8
    if plan.precision != "fp32":
        float16.check_range((network_path(name), value.detach().numpy()) for name, value in folded.named_parameters())
    sizes = (plan.imgsz, *plan.more_imgsz)
    first, *others = programs = [_trace(module, folded, replace(plan, imgsz=size, more_imgsz=())) for size in sizes]
    for program in programs:
        program.model.short_description = " ".join(metadata[key] for key in ("variant", "family") if metadata.get(key))
        program.model.user_defined_metadata.update(metadata)
    return replace(first, more=dict(zip(plan.more_imgsz, others, strict=True)))


def _trace(module: Any, folded: nn.Module, plan: ExportPlan) -> MlProgram:
    """Convert a module for one image size, without metadata.

    folded: the module with Core ML's input layout and BatchNorm folded.
    """
    import torch

    from evm_deploy.model.foreign.look import place_of

    ct, shown = converter(), example(plan, module.channels)
    with silence_libraries(), torch.no_grad():
        traced = torch.jit.trace(folded, shown, check_trace=False)  # type: ignore[no-untyped-call]
        graph = traced.inlined_graph  # keep a reference: nodes are freed with their graph
        calls: Counter[str] = Counter()
        paths = [call_name(network_path(module_path(node)), calls) for node in graph.findAllNodes(OP)]
        labels = plan.labels if plan.head == "probs" else None
        outputs = [
            ct.TensorType(name=name, dtype=np.int32 if name in INTEGERS else np.float32) for name in module.outputs
        ]
        with _scans_named(paths):
            _number_from_zero()
            model = _convert(
                traced,
                lambda operation: place_of(operation, folded, shown),
                inputs=[_input_type(plan, tuple(shown.shape))],
                **({"classifier_config": ct.ClassifierConfig(list(labels))} if labels else {"outputs": outputs}),
                minimum_deployment_target=getattr(ct.target, plan.min_target or DEFAULT_MIN_TARGET),
                compute_precision=ct.precision.FLOAT32 if plan.precision == "fp32" else half_precision(),
            )
        given = {each.name for each in model.get_spec().description.output}
        if not labels and (lost := [name for name in module.outputs if name not in given]):
            raise UsageError(
                f"Core ML gives one tensor as one output: {', '.join(lost)} of the network is another output, too",
                "return the tensor once",
            )
        if labels:
            model = _rename_output(model, PROBABILITIES, str(plan.head))
    model.user_defined_metadata.pop("com.github.apple.coremltools.conversion_date", None)  # the same bytes every day
    if labels:
        model.user_defined_metadata["com.apple.coreml.model.preview.type"] = "imageClassifier"
    modules = {f"{path.replace('.', '_')}_weight": network_path(path) for path, _ in folded.named_modules()}
    return MlProgram(model, module, tuple(ScanSite(path, {}, "") for path in paths), modules)


def scan_program(shape: ScanShape, min_target: str) -> Any:
    """Return a program of one scan, lowered as in the artifact: seven float32 inputs, batch 1, output `y`."""
    ct = converter()
    from coremltools.converters.mil import Builder as mb

    K, L, D, N = shape
    shapes = {"u": (1, K, L, D), "delta": (1, K, L, D), "A": (K, D, N), "B": (1, K, L, N), "C": (1, K, L, N)}
    shapes |= {"skip": (K, D), "bias": (K, D)}

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, skip: Any, bias: Any) -> Any:
        return mb.identity(x=mil.selective_scan(u, delta, A, B, C, skip, bias), name="y")

    target = getattr(ct.target, min_target)
    with silence_libraries():
        _number_from_zero()
        program = mb.program(input_specs=[mb.TensorSpec(shape) for shape in shapes.values()], opset_version=target)(
            scan
        )
        return _convert(program, minimum_deployment_target=target, compute_precision=ct.precision.FLOAT32)


def scan_prefix(path: str) -> str:
    """Return the prefix of the names of all operations of the scan in module `path`."""
    return f"{mil.PREFIX}_{path.replace('.', '_').replace('#', '_call')}"


def channels_first(module: nn.Module, plan: ExportPlan) -> nn.Module:
    """Wrap a module for Core ML's input layout: an image is float (1, channels, H, W) with pixels 0..255."""
    from torch import nn

    class ChannelsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = module

        def forward(self, x: Tensor) -> Any:
            return self.wrapped(x.permute(0, 2, 3, 1))

    return ChannelsFirst().eval() if plan.input == "image" else module


def example(plan: ExportPlan, channels: int) -> Tensor:
    """Return an example input in Core ML's layout: zeros, float32 (batch, channels, H, W)."""
    import torch

    height, width = plan.imgsz or (0, 0)
    return torch.zeros(plan.batch.min, channels, height, width)


def _number_from_zero() -> None:
    """Number the unnamed operations of the next program from 0, whatever this process has converted before.

    coremltools 9.0 counts operations per process: a second conversion of the same network would give other bytes.
    """
    from coremltools.converters.mil import Builder

    Builder.name_count.clear()


def _convert(source: Any, place: Callable[[str], str] = lambda operation: "", **options: Any) -> Any:
    """Convert a program or a traced module. place(operation): returns where the network's code calls an operation."""
    ct = converter()
    try:
        with rarely_checked(), silence_libraries(logging.ERROR):
            return ct.convert(
                source, convert_to="mlprogram", pass_pipeline=exact_pipeline(), skip_model_load=True, **options
            )
    except Exception as error:  # coremltools raises exceptions of many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if missing := re.match(r"PyTorch convert function for op '(.+?)' not implemented", reason):
            called = f"{missing[1]}{place(missing[1])}"
            raise UsageError(
                f"the network calls {called}, which coremltools {ct.__version__} does not convert",
                "write it with other operations of torch",
            ) from error
        raise ToolchainError(
            f"coremltools {ct.__version__} cannot convert the network: {reason}",
            "write that part with other operations of torch, or report this, with the output of evm-doctor",
        ) from error


@contextmanager
def _scans_named(paths: Iterable[str]) -> Iterator[None]:
    """Context manager in which converted scans are named after these module paths, in execution order."""
    _register_scan()
    register_suppression()
    token = _scan_paths.set(iter(paths))
    try:
        yield
    finally:
        _scan_paths.reset(token)


@cache
def _register_scan() -> None:
    """Make coremltools convert evm::selective_scan with our composite of MIL operations, in this process."""
    from coremltools.converters.mil import register_torch_op
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    @register_torch_op(torch_alias=[OP], override=True)  # type: ignore[untyped-decorator]
    def selective_scan(context: Any, node: Any) -> None:
        *tensors, softplus = _get_inputs(context, node, expected=8)
        prefix = scan_prefix(next(_scan_paths.get()))
        y = mil.selective_scan(*tensors, delta_softplus=bool(softplus.val), prefix=prefix)
        context.add(y, torch_name=node.name)


def network_path(path: str) -> str:
    """Remove the wrappers' names from a module path: `wrapped.model.layers.0` -> `layers.0`."""
    return path.removeprefix("wrapped.").removeprefix(f"{ROOT}.")


def _input_type(plan: ExportPlan, shape: tuple[int, ...]) -> Any:
    ct = converter()
    if plan.input == "image":
        colours = ct.colorlayout.RGB if shape[1] == 3 else ct.colorlayout.GRAYSCALE
        return ct.ImageType(name=plan.input, shape=shape, color_layout=colours)
    return ct.TensorType(name=TENSOR_INPUT, shape=shape, dtype=np.float32)


def _rename_output(model: Any, old: str, new: str) -> Any:
    ct = converter()
    spec = model.get_spec()
    ct.utils.rename_feature(spec, old, new)
    return ct.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)
