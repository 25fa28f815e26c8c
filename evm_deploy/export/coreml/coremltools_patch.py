"""coremltools for conversion, with a patch that version 9.0 needs for NumPy 2.4 and later."""

from __future__ import annotations

from functools import cache, wraps
from importlib import metadata
from typing import Any

import numpy as np

from evm_deploy._util.silence import silence_libraries
from evm_deploy.runtimes.coreml.tools import coremltools

# Rewrites x * scale + shift as a batch_norm with epsilon 1e-5. The error of 5e-6 is larger than any other of float32.
INEXACT_PASS = "common::fuse_elementwise_to_batchnorm"
PATCHED_VERSION = "9.0"  # also the version whose private passes quantise activations


@cache
def converter() -> Any:
    """Return coremltools, ready to convert torch modules: patched if its version needs the patch."""
    ct = coremltools()
    if metadata.version("coremltools") == PATCHED_VERSION and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        with silence_libraries():
            _patch_cast()
    return ct


def exact_pipeline() -> Any:
    """Return coremltools' default passes, without the pass that changes results."""
    pipeline = coremltools().PassPipeline.DEFAULT
    pipeline.remove_passes({INEXACT_PASS})
    return pipeline


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
