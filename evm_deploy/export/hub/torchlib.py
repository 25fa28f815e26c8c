"""onnxscript's functions for torch's operators, listed for torch's exporter without parsing their sources."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Translation:
    """ONNX function of an operator of torch: the part of onnxscript's record that torch reads."""

    qualified_name: str
    function: Any
    is_complex: bool


@contextlib.contextmanager
def unparsed_torchlib() -> Iterator[None]:
    """Context manager in which torch.onnx.export does not parse the functions of onnxscript that it does not call.

    For each export onnxscript 0.7.2 parses the sources of all 557 functions, to give the domain of each, which torch
    2.13 never reads: 0.6 of the 3.5 CPU seconds of a small network. A function is parsed when a graph needs it.
    """
    from torch.onnx._internal._lazy_import import onnxscript_apis as apis  # type: ignore[attr-defined]

    listed = apis.get_torchlib_ops
    apis.get_torchlib_ops = translations
    try:
        yield
    finally:
        apis.get_torchlib_ops = listed


def translations() -> list[Translation]:
    """Return all functions of onnxscript's library but its internal ones."""
    from onnxscript.function_libs.torch_lib import ops, registration  # noqa: F401  ops fill the registry

    return [
        Translation(name, function, is_complex)
        for name, functions in registration.default_registry.items()
        if not name.startswith("internal::")
        for is_complex, group in ((False, functions.overloads), (True, functions.complex))
        for function in group
    ]
