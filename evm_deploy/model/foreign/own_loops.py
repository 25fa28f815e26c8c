"""Replacement of functions in a package by ours, where both compute the same on random tensors.

Some packages loop over the tokens in Python whenever a tensor is on the CPU: traced, that is thousands of nodes. Others
write the orders of a scan into an empty tensor, which becomes nodes that Core ML and TensorRT do not like.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from evm_deploy.model.foreign.orders import cross_scan
from evm_deploy.model.foreign.scan import scan

LOOPS = ("selective_scan_torch", "selective_scan_ref", "selective_scan_easy")
TENSORS = ("u", "delta", "A", "B", "C", "D")  # the first six arguments of every such function, under various names
CROSS_SCANS = ("CrossScan", "CrossScanF")  # classes of autograd functions
SAME = 1e-4
#: Class of an autograd function of a package -> the function in the place of its `apply`.
replaced: WeakKeyDictionary[type, Callable[..., Any]] = WeakKeyDictionary()


def replace_own_loops(modules: Iterable[ModuleType]) -> None:
    """Replace LOOPS and CROSS_SCANS of these modules by our functions, if these compute the same."""
    for module in modules:
        names = getattr(module, "__dict__", {})
        for name in LOOPS:
            loop = names.get(name)
            if isinstance(loop, FunctionType) and _same(loop):
                setattr(module, name, adapted(loop))
        for name in CROSS_SCANS:
            cls = names.get(name)
            if isinstance(cls, type) and issubclass(cls, torch.autograd.Function) and _same_cross_scan(cls):
                replaced[cls] = _cross_scan_of(cls)


def _cross_scan_of(cls: Any) -> Callable[..., Tensor]:
    """Return the cross scan with the arguments of a class's `apply`. The class's own forward computes other orders."""
    signature = inspect.signature(cls.forward)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        values = [*bound.arguments.values()][1:]
        if any(values[3:]):  # one_by_one, scans
            return cls.forward(Context(), *args, **kwargs)
        return cross_scan(*values[:3])

    return call


def _same_cross_scan(cls: Any) -> bool:
    x = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    options: list[tuple[bool, ...]] = [()]
    try:
        if len(inspect.signature(cls.forward).parameters) > 2:
            options += [(True, last) for last in (True, False)]
        return all(torch.equal(cls.forward(Context(), x, *each), cross_scan(x, *each)) for each in options)
    except Exception:  # code of others: whatever it raises, it is left as it is
        return False


class Context(SimpleNamespace):
    """The context of an autograd function's forward: keeps nothing for the backward pass, which never comes."""

    needs_input_grad = (False,) * 64

    def save_for_backward(self, *_: Any) -> None:
        """Keep nothing."""

    mark_non_differentiable = mark_dirty = set_materialize_grads = save_for_forward = save_for_backward


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
