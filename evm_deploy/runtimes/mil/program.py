"""Load an mlprogram package, and compute its operations in order with rules in torch."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import native_path
from evm_deploy._util.silence import silence_libraries
from evm_deploy.errors import BundleError, UsageError
from evm_deploy.runtimes.coreml.tools import coremltools
from evm_deploy.runtimes.mil.rule import Rule, UnsupportedError, tensor
from evm_deploy.runtimes.mil.rules import all_rules

SMALL = {"int16": (-(1 << 15), (1 << 15) - 1), "uint16": (0, (1 << 16) - 1)}
COMPUTED_IN = {
    **dict.fromkeys(("fp16", "fp32"), "float32"),
    **dict.fromkeys(("int32", "int16", "uint16"), "int32"),
    **{name: name for name in ("int8", "uint8", "bool")},
}


@dataclass(frozen=True)
class Declared:
    """Declaration of an input or result in the file.

    dtype: MIL's name, such as `fp16`. shape: None for a string; a size is None if it depends on values.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Test whether a tensor may have this shape. A scalar may have any number of dimensions."""
        if not self.shape:
            return all(size == 1 for size in shape)
        return len(shape) == len(self.shape) and all(
            want in (None, have) for want, have in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True)
class Operation:
    """Operation of a program.

    constants: constant inputs by parameter name. variables: other inputs by parameter name; each is the name of a
    tensor, or a tuple of names. weight: name of the constant that is the weight; empty if there is none.
    """

    type: str
    name: str
    rule: Rule
    constants: Mapping[str, Any]
    variables: Mapping[str, str | tuple[str, ...]]
    results: tuple[Declared, ...]
    weight: str = ""

    @property
    def reads(self) -> Iterator[str]:
        """Names of all tensors that the operation reads, except constants that are not in a tuple."""
        for value in self.variables.values():
            yield from (value,) if isinstance(value, str) else value


class Program:
    """Function of an mlprogram package that can be computed.

    Loading runs the type inference of coremltools over the file, and refuses operations without a rule. function: None
    for the default function of the package. exact: skip float16 roundings between operations; weights stay as stored.
    `inputs`: declared inputs by name. `outputs`: names of the outputs. `constants`: float32 tensors of the weights by
    name. `largest`: largest magnitude of all float16 results so far.
    Raises BundleError for a file that cannot be loaded or computed.
    """

    def __init__(self, path: Path, function: str | None = None, *, exact: bool = False) -> None:
        self.path, self.exact, self.largest = path, exact, 0.0
        self.spec, loaded = _load(path)
        self.function = function = function or self.spec.description.defaultFunctionName or "main"
        if function not in loaded.functions:
            raise BundleError(f"{path} has no function {function!r}; it has: {', '.join(loaded.functions)}")
        source = loaded.functions[function]
        self.inputs = {name: _declared(var) for name, var in source.inputs.items()}
        self.constants: dict[str, Any] = {}
        self.operations: list[Operation] = []
        rules = all_rules()
        unknown = {op.op_type for op in source.operations} - set(rules) - {"const"}
        if unknown:
            raise BundleError(
                f"{path.name}: the MIL runtime, which verifies Core ML models, has no rule for "
                f"{', '.join(sorted(unknown))}",
                "write the network with other operations, or use another target",
            )
        for op in source.operations:
            if op.op_type.startswith("constexpr_"):  # compressed weights are expanded once, at loading
                operation = self._operation(op, rules)
                self.constants[operation.results[0].name] = self._apply(operation, {})[0]
            elif op.op_type != "const":
                self.operations.append(self._operation(op, rules))
        self.outputs = tuple(var.name for var in source.outputs)
        self._makers = {result.name: op for op in self.operations for result in op.results}

    def run(self, feeds: Mapping[str, NDArray[Any]], wanted: Sequence[str] | None = None) -> dict[str, Any]:
        """Compute the tensors `wanted`, by default all outputs. Returns arrays by name; strings stay strings.

        `feeds` and `wanted` may also name tensors between operations. Only required operations are computed. The
        arrays belong to the caller. Raises UsageError for a missing feed or an unknown name, BundleError for a result
        that differs from its declaration.
        """
        import torch

        wanted = tuple(wanted if wanted is not None else self.outputs)
        values: dict[str, Any] = {}
        for name, array in feeds.items():
            declared = self.inputs.get(name) or self.declared(name)
            values[name] = self._checked(torch.from_numpy(np.ascontiguousarray(array)), declared, "feed")
        needed = self._needed(wanted, set(values))
        uses = Counter(name for op in needed for name in op.reads) + Counter(wanted)
        with torch.inference_mode():
            for op in needed:
                for result, value in zip(op.results, self._apply(op, values), strict=True):
                    values[result.name] = value
                for name in op.reads:  # free a tensor after its last use
                    uses[name] -= 1
                    if not uses[name]:
                        values.pop(name, None)
        return {name: _as_numpy(values[name]) for name in wanted}

    def declared(self, name: str) -> Declared:
        """Return the declaration of the result `name`. Raises UsageError if no operation has such a result."""
        if name not in self._makers:
            raise UsageError(f"{self.path} has no tensor {name!r}")
        return next(result for result in self._makers[name].results if result.name == name)

    def _needed(self, wanted: Sequence[str], fed: set[str]) -> list[Operation]:
        """Return the operations that compute `wanted` from `fed`, in order. Raises UsageError for a missing feed."""
        missing: set[str] = set()
        needed: set[str] = set()
        stack = [name for name in wanted if name not in fed]
        while stack:
            name = stack.pop()
            if name in self._makers:
                op = self._makers[name]
                if op.results[0].name not in needed:
                    needed.add(op.results[0].name)
                    stack += [read for read in op.reads if read not in fed]
            elif name not in self.constants:
                missing.add(name)
        if missing:
            raise UsageError(f"missing tensors: {', '.join(sorted(missing))}; neither given nor computed")
        return [op for op in self.operations if op.results[0].name in needed]

    def _operation(self, op: Any, rules: Mapping[str, Rule]) -> Operation:
        known = inspect.signature(rules[op.op_type]).parameters
        constants: dict[str, Any] = {}
        variables: dict[str, str | tuple[str, ...]] = {}
        for key, var in op.inputs.items():
            if var is None:
                continue
            if key not in known:
                raise BundleError(f"{self.path}: {op.op_type} {op.name}: the rule does not support the input {key!r}")
            parts = var if isinstance(var, list | tuple) else [var]
            if all(_is_constant(part) for part in parts) and not any(part.name in self.constants for part in parts):
                constants[key] = self._constant(var)
            elif isinstance(var, list | tuple):
                for part in filter(_is_constant, var):  # such as a class token between the tokens of an image
                    self.constants.setdefault(part.name, tensor(self._constant(part)))
                variables[key] = tuple(part.name for part in var)
            elif var.name in self.constants:
                constants[key] = self.constants[var.name]
            else:
                variables[key] = var.name
        results = tuple(_declared(var) for var in op.outputs)
        weight = op.inputs["weight"].name if "weight" in op.inputs else ""
        return Operation(op.op_type, op.name, rules[op.op_type], constants, variables, results, weight)

    def _constant(self, var: Any) -> Any:
        """Convert a constant: floats to float32 tensors (kept in `constants`), other values to Python values.

        Integer constants with more than 64 elements are quantised weights, and become tensors.
        """
        import torch

        if isinstance(var, list | tuple):
            return [self._constant(part) for part in var]
        value = np.asarray(var.val)
        if value.dtype.kind == "f":
            self.constants.setdefault(var.name, torch.from_numpy(np.array(value, np.float32)))
            return self.constants[var.name]
        if value.dtype.kind in "iu" and value.size > 64:
            return torch.from_numpy(np.array(value))
        return value.tolist()

    def _apply(self, op: Operation, values: Mapping[str, Any]) -> list[Any]:
        """Compute one operation, and check its results. Raises BundleError."""

        def value(name: str) -> Any:
            return values[name] if name in values else self.constants[name]

        inputs = {
            key: value(name) if isinstance(name, str) else [value(part) for part in name]
            for key, name in op.variables.items()
        }
        try:
            computed = op.rule(**op.constants, **inputs)
        except UnsupportedError as error:
            raise BundleError(f"{self.path}: {op.name}: no rule for {error}") from error
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise BundleError(f"{self.path}: {op.type} {op.name} cannot be computed: {reason}") from error
        parts = list(computed) if isinstance(computed, tuple) else [computed]
        if len(parts) != len(op.results):
            raise BundleError(
                f"{self.path}: {op.type} {op.name} gives {len(parts)} results, declared are {len(op.results)}"
            )
        return [
            self._checked(part, result, f"{op.type} {op.name}") for part, result in zip(parts, op.results, strict=True)
        ]

    def _checked(self, value: Any, declared: Declared, what: str) -> Any:
        """Return `value`, rounded to float16 if declared so. Raises BundleError for an undeclared dtype or shape."""
        import torch

        if declared.shape is None or not isinstance(value, torch.Tensor):
            return value
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        if dtype != COMPUTED_IN.get(declared.dtype) or not declared.admits(shape):
            said = f"{declared.dtype}{list(declared.shape)}"
            raise BundleError(f"{self.path}: {what} gives {dtype}{list(shape)}, declared is {said}")
        if declared.dtype in SMALL and value.numel():
            low, high = torch.aminmax(value)
            if not (SMALL[declared.dtype][0] <= int(low) and int(high) <= SMALL[declared.dtype][1]):
                raise BundleError(f"{self.path}: {what} gives {int(high)}, which {declared.dtype} cannot hold")
        if declared.dtype != "fp16" or self.exact or not value.numel():
            return value
        low, high = torch.aminmax(value)
        self.largest = max(self.largest, -float(low), float(high))
        return value.half().float()


def _load(path: Path) -> tuple[Any, Any]:
    """Load a package with coremltools. Returns its specification and its program. Raises BundleError."""
    if not path.exists():
        raise BundleError(f"{path} does not exist")
    ct = coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    package = native_path(path)
    try:
        with silence_libraries():
            spec = ct.utils.load_spec(package)
            weights = path / "Data" / "com.apple.CoreML" / "weights"
            return spec, load(spec, spec.specificationVersion, str(weights))
    except Exception as error:  # coremltools raises many types for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"{path} is not a readable mlprogram package: {reason}") from error


def _is_constant(var: Any) -> bool:
    return var.op is not None and var.op.op_type == "const"


def _declared(var: Any) -> Declared:
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    if not (types.is_tensor(var.sym_type) or types.is_scalar(var.sym_type)) or types.is_str(var.dtype):
        return Declared(var.name, "str", None)
    shape = tuple(None if is_symbolic(size) else int(size) for size in var.shape)
    return Declared(var.name, types.builtin_to_string(var.dtype), shape)


def _as_numpy(value: Any) -> Any:
    return value if isinstance(value, str) else np.array(value.numpy())
