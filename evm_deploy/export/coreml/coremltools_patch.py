"""coremltools ready to convert: with what its version 9.0 lacks for today's numpy."""

from __future__ import annotations

from functools import cache, wraps
from importlib import metadata
from typing import Any

import numpy as np

from evm_deploy._util.silence import silence_libraries
from evm_deploy.runtimes.coreml.tools import coremltools

# Rewrites x * scale + shift as a batch_norm of epsilon 1e-5: off by 5e-6, more than float32 costs anywhere else.
INEXACT_PASS = "common::fuse_elementwise_to_batchnorm"
PATCHED_VERSION = "9.0"  # also the one whose private passes quantise activations


@cache
def converter() -> Any:
    """The package, ready to convert torch modules: patched where its version needs that."""
    ct = coremltools()
    if metadata.version("coremltools") == PATCHED_VERSION and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        with silence_libraries():
            _patch_cast()
    return ct


def exact_pipeline() -> Any:
    """coremltools' own passes, but for the one that changes results."""
    pipeline = coremltools().PassPipeline.DEFAULT
    pipeline.remove_passes({INEXACT_PASS})
    return pipeline


def _patch_cast() -> None:
    """coremltools 9.0 calls int() on one-element arrays, which NumPy >= 2.4 refuses: any traced shape arithmetic fails.

    apple/coremltools#2633, fixed after 9.0. test_the_cast_patch_is_still_needed fails on the day this can go.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    original = ops._cast
    if hasattr(original, "__wrapped__"):  # by another thread
        return

    @wraps(original)
    def cast(context: Any, node: Any, dtype: Any, dtype_name: str) -> None:
        x = ops._get_inputs(context, node, expected=1)[0]
        if x.can_be_folded_to_const() and isinstance(x.val, np.ndarray) and x.val.size == 1:
            context.add(mb.const(val=dtype(x.val.item()), name=node.name), node.name)
        else:
            original(context, node, dtype, dtype_name)

    ops._cast = cast
