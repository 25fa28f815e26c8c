"""Replacement of a package's own Python loop over the tokens by the op.

Some packages choose such a loop whenever a tensor is on the CPU. Traced, it would be thousands of nodes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from evm_deploy.model.foreign.scan import scan

LOOPS = ("selective_scan_torch", "selective_scan_ref", "selective_scan_easy")
TENSORS = ("u", "delta", "A", "B", "C", "D")  # the first six arguments of every such function, under various names
SAME = 1e-4


def replace_own_loops(modules: Iterable[ModuleType]) -> list[str]:
    """Replace the functions named in LOOPS in these modules, if they compute what the op does. Returns their names."""
    done = []
    for module in modules:
        for name in LOOPS:
            loop = getattr(module, "__dict__", {}).get(name)
            if isinstance(loop, FunctionType) and _same(loop):
                setattr(module, name, adapted(loop))
                done.append(f"{module.__name__}.{name}")
    return done


def adapted(loop: FunctionType) -> Callable[..., Tensor]:
    """Return the scan with the signature of `loop`. It calls `loop` itself for what the op does not return."""
    signature = inspect.signature(loop)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        if values.get("return_last_state"):
            return loop(*args, **kwargs)
        tensors = dict(zip(TENSORS, [*values.values()], strict=False))
        named = {key: values[key] for key in ("z", "delta_bias", "delta_softplus") if key in values}
        return scan(**tensors, **named)

    return call


def _same(loop: FunctionType) -> bool:
    """Compare a loop with its replacement on random tensors, two groups of B and C, with and without softplus."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random)

    tensors = [draw(1, 4, 5), draw(1, 4, 5), -draw(4, 3), draw(1, 2, 3, 5), draw(1, 2, 3, 5), draw(4)]
    try:
        for softplus in (True, False):
            options = {"delta_bias": draw(4), "delta_softplus": softplus}
            want = loop(*tensors, **options)
            if not torch.allclose(want.float(), adapted(loop)(*tensors, **options), rtol=SAME, atol=SAME):
                return False
    except Exception:  # code of others: whatever it raises, it is left as it is
        return False
    return True
