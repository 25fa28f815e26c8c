"""Running and tracing of foreign modules: what their code does at run time that neither a CPU nor a tracer can do."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from evm_deploy.model.foreign.imports import LIBRARIES, importable
from evm_deploy.model.foreign.own_loops import Context, replaced
from evm_deploy.model.foreign.stand_ins import AUTOGRAD


@contextmanager
def foreign_code() -> Iterator[None]:
    """Context manager in which foreign modules run and are traced on the CPU.

    Autograd functions become their forward, or their stand-in (`stand_ins.AUTOGRAD`): a tracer would keep them as calls
    into Python. `torch.cuda.device` of a CPU does nothing. The constructor of a Tensor subclass returns its argument: a
    subclass cannot be made of a tracer's tensors. Imports inside of forward find the stand-ins.
    """
    real = torch.cuda.device
    with ExitStack() as stack:
        stack.enter_context(importable())
        stack.enter_context(patch.object(torch.autograd.Function, "apply", classmethod(_forward)))
        for cls in torch.Tensor.__subclasses__():
            if cls.__module__.partition(".")[0] not in LIBRARIES:
                stack.enter_context(patch.object(cls, "__new__", staticmethod(_first_argument)))
        stack.enter_context(
            patch.object(torch.cuda, "device", lambda at: nullcontext() if str(at).startswith("cpu") else real(at))
        )
        yield


def _first_argument(cls: type, x: Any, *_: Any, **__: Any) -> Any:
    return x


def _forward(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an autograd function's stand-in, else its forward."""
    if cls.__name__ in AUTOGRAD:
        names = [*inspect.signature(cls.forward).parameters][1:]  # releases differ in the order of arguments
        return AUTOGRAD[cls.__name__](**dict(zip(names, args, strict=False)), **kwargs)
    if cls in replaced:
        return replaced[cls](*args, **kwargs)
    if cls.setup_context is not torch.autograd.Function.setup_context:
        return cls.forward(*args, **kwargs)
    return cls.forward(Context(), *args, **kwargs)
