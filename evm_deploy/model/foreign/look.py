"""A first look at a module before its export: one run that finds what no artifact could reproduce."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from evm_deploy.errors import EvmError, UsageError
from evm_deploy.model.foreign import ssd
from evm_deploy.model.foreign.running import foreign_code

#: Operations of one run above which a graph takes minutes to load. The largest network tried has 2500.
MOST_OPERATIONS = 30_000
SCAN = "evm::selective_scan"
READ = "aten::_local_scalar_dense"  # bool(tensor), int(tensor), tensor.item()
OTHERS = (Exception, SystemExit)  # raised by code of others: an import or a run may call sys.exit
OURS, TORCH = (str(Path(module.__file__ or "").parent) for module in (sys.modules["evm_deploy"], torch))
PYTHON = str(Path(contextlib.__file__).parent)  # the standard library, in which packages may be installed


@dataclass(frozen=True)
class Look:
    """Facts of one run.

    outputs: tensors by name. scans: number of Mamba-1 scans. chunked: number of Mamba-2 scans. reads: `file:line` where
    values are read.
    """

    outputs: dict[str, Tensor]
    scans: int
    chunked: int
    reads: tuple[str, ...]


def look_at(module: nn.Module, example: Tensor) -> Look:
    """Run a module in eval mode on an example input, and twice on the same. Raises UsageError, with the reason.

    Refused are modules that raise, return something else than tensors, return what no artifact has (`check_outputs`),
    or give different outputs for the same input, and runs of more than MOST_OPERATIONS operations.
    """
    watch = _Watch()
    with torch.no_grad(), foreign_code():
        first = _run(module, example)  # some modules make their tensors in the first run
        before = ssd.calls.total()
        with watch:
            outputs = _run(module, example)
        chunked = ssd.calls.total() - before
    if watch.total > MOST_OPERATIONS:
        place, count = watch.lines.most_common(1)[0]
        raise UsageError(
            f"one run of the network is {watch.total} operations, {count} of them at {place}: a loop over the tokens",
            "import the network within evm_deploy.cpu_mamba(), or register the op in place of the loop",
        )
    check_outputs(outputs, len(example))
    for name, value in outputs.items():
        differ = first[name].shape != value.shape or not torch.equal(first[name].nan_to_num(), value.nan_to_num())
        if differ and not torch.allclose(first[name], value, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise UsageError(
                f"the network is random at inference: output {name} differs between two runs on the same input",
                "replace the random operation, such as dropout or gumbel_softmax, by its mean behaviour",
            )
    return Look(outputs, watch.scans, chunked, tuple(watch.reads))


def check_outputs(outputs: Mapping[str, Tensor], batch: int) -> None:
    """Raise UsageError for outputs that no artifact has.

    These are no output at all, tensors that are sparse, empty, boolean or complex, and
    tensors whose first size is not the batch.
    """
    if not outputs:
        raise UsageError("the network returns nothing", "return tensors whose first dimension is the batch")
    for name, value in outputs.items():
        strided = value.layout == torch.strided
        numbers = strided and value.dtype != torch.bool and not value.is_complex()
        if not numbers or not value.dim() or len(value) != batch or not value.numel():
            kind = str(value.dtype if strided else value.layout).removeprefix("torch.")
            raise UsageError(
                f"output {name} of the network is {kind}{list(value.shape)}, but an artifact gives real numbers of "
                f"shape (batch, ..), here [{batch}, ..]",
                "return another shape, or the tensor as numbers: .float()",
            )


def _run(module: nn.Module, example: Tensor) -> dict[str, Tensor]:
    try:
        return dict(named_tensors(module(example)))
    except EvmError:
        raise
    except OTHERS as error:
        raise UsageError(
            f"the network does not run on an input {list(example.shape)}: {reason(error)}",
            "an artifact takes one input, images (b, channels, H, W): wrap a network of other inputs; see also --imgsz "
            "and --channels",
        ) from error


def named_tensors(found: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a module's result: a tensor, or tuples, lists and dicts of these. None is left out.

    Keys of a dict are names; items of a sequence have the sequence's name and a number, if there are several. A name
    is `output` where there is no key. Raises UsageError for a value of another type.
    """
    if isinstance(found, Tensor):
        yield name or "output", found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from named_tensors(value, f"{name}_{key}" if name else str(key))
    elif isinstance(found, Sequence) and not isinstance(found, str):
        several = len(found) > 1
        for number, value in enumerate(found):
            yield from named_tensors(value, f"{name or 'output'}{number}" if several else name)
    elif found is not None:
        raise UsageError(f"the network returns a {type(found).__name__}", "wrap it in a module that returns tensors")


def innermost(error: BaseException) -> BaseException:
    """Return the first of the exceptions that led to this one."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


def reason(error: BaseException) -> str:
    """Return the first line of an exception's innermost cause, and `file:line` of the last code that is of others.

    That is code of neither torch, Python nor this package.
    """
    error = innermost(error)
    trace, place = error.__traceback__, ""
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if _is_of_others(file):
            place = f" ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}{place}"


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count of the operations of a run: in all, by line of code, scans, and the lines that read a tensor's value.

    Raises UsageError for operators that call functions, such as torch.cond and torch.map: no artifact has them.
    """

    supports_higher_order_operators = True  # they come here, too

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.scans = 0
        self.lines: Counter[str] = Counter()
        self.reads: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            name = func.name().removesuffix("_impl")  # type: ignore[no-untyped-call]
            raise UsageError(
                f"the network calls torch's operator {name} ({_place()}), and no artifact has operators that run "
                "functions",
                "write what these compute without the operator, such as torch.where in place of cond, or a batch in "
                "place of map",
            )
        name = func.name().partition(".")[0]
        self.total += 1
        self.scans += name == SCAN
        place = _place()
        self.lines[place] += 1
        if name == READ:
            self.reads[place] = None
        return func(*args, **(kwargs or {}))


def place_of(operation: str, module: nn.Module, example: Tensor) -> str:
    """Return ` (file:line)` of the first call of an operation in a run of the module, or nothing if there is none.

    operation: a name as torch or a converter writes it: `prims.bessel_j0` is a call of `aten::special_bessel_j0`.
    """
    calls = _Calls(re.split("[.:]", operation)[-1].replace("_", ""))
    with torch.no_grad(), contextlib.suppress(*OTHERS), foreign_code(), calls:
        module(example)
    return f" ({calls.place})" if calls.place else ""


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The place of the first call of an operator whose name, without overload and underlines, ends with `name`."""

    supports_higher_order_operators = True

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name, self.place = name, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.place and func.name().partition(".")[0].replace("_", "").endswith(self.name):
            self.place = _place()
        return func(*args, **(kwargs or {}))


def _is_of_others(file: str) -> bool:
    """Test whether a source file is neither torch's, nor Python's, nor of this package."""
    python = file.startswith(PYTHON) and "site-packages" not in file
    return not python and not file.startswith((OURS, TORCH, "<"))


def _place() -> str:
    """Return `file:line` of the innermost frame that is of others."""
    frame: Any = sys._getframe(2)
    while frame and not _is_of_others(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
