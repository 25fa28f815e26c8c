"""coremltools for conversion, patched: for NumPy 2.4 and later, and to check programs less often."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from importlib import metadata
from typing import Any

import numpy as np

from evm_deploy._util.silence import silence_libraries
from evm_deploy.runtimes.coreml.tools import coremltools

# Rewrites x * scale + shift as a batch_norm with epsilon 1e-5. The error of 5e-6 is larger than any other of float32.
INEXACT_PASS = "common::fuse_elementwise_to_batchnorm"
PATCHED_VERSION = "9.0"  # also the version whose private passes quantise activations

_checks_rarely: ContextVar[bool] = ContextVar("checks_rarely", default=False)


@cache
def converter() -> Any:
    """Return coremltools, ready to convert torch modules: patched if its version needs the patch."""
    ct = coremltools()
    with silence_libraries():
        if metadata.version("coremltools") == PATCHED_VERSION and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            _patch_cast()
        _patch_validate()
    return ct


def exact_pipeline() -> Any:
    """Return coremltools' default passes, without the pass that changes results."""
    pipeline = coremltools().PassPipeline.DEFAULT
    pipeline.remove_passes({INEXACT_PASS})
    return pipeline


@contextmanager
def rarely_checked() -> Iterator[None]:
    """Context manager in which coremltools checks a program before each of its pipelines, not after each pass.

    A conversion runs 100 passes. The checks after them take a third of its time, and find the same faults.
    """
    token = _checks_rarely.set(True)
    try:
        yield
    finally:
        _checks_rarely.reset(token)


def _patch_validate() -> None:
    """Make `Program.validate` do nothing after a pass within `rarely_checked`, but for dead-code elimination."""
    from coremltools.converters.mil.mil import Program

    original = Program.validate
    if hasattr(original, "__wrapped__"):  # patched by another thread
        return

    @wraps(original)
    def validate(self: Any, **options: Any) -> None:
        after_a_pass = options == {"check_essential_scope": False}
        if not (after_a_pass and _checks_rarely.get()):
            original(self, **options)

    Program.validate = validate


def _patch_cast() -> None:
    """Patch `_cast` of coremltools 9.0, which calls int() on one-element arrays. NumPy >= 2.4 refuses the call.

    Without the patch, any traced shape arithmetic fails: apple/coremltools#2633, fixed after 9.0.
    test_the_cast_patch_is_still_needed fails as soon as the patch can be removed.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    original = ops._cast
    if hasattr(original, "__wrapped__"):  # patched by another thread
        return

    @wraps(original)
    def cast(context: Any, node: Any, dtype: Any, dtype_name: str) -> None:
        x = ops._get_inputs(context, node, expected=1)[0]
        if x.can_be_folded_to_const() and isinstance(x.val, np.ndarray) and x.val.size == 1:
            context.add(mb.const(val=dtype(x.val.item()), name=node.name), node.name)
        else:
            original(context, node, dtype, dtype_name)

    ops._cast = cast
