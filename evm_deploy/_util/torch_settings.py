"""Global settings of torch: set in a block, restored afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def default_torch_settings() -> Iterator[None]:
    """Context manager in which torch computes in float32 on the CPU, whatever the program around it has set.

    Set are the default dtype and device, autocast, grad mode, deterministic algorithms, the precision of float32
    products and the detection of anomalies. All of them, and the number of threads, are restored. Also usable as a
    decorator. Settings of the whole process change for other threads meanwhile, too.
    """
    import torch

    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    products = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        if deterministic:  # a call without need would import torch._inductor: 1.3 CPU seconds
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
            torch.use_deterministic_algorithms(False)
        stack.callback(torch.set_float32_matmul_precision, products)
        stack.callback(torch.set_num_threads, threads)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if torch.get_default_device().type != "cpu":  # in this context every call into torch passes through Python
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Context manager in which torch computes with `count` threads; None leaves the number as it is."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def no_stack_traces() -> Iterator[None]:
    """Context manager in which torch traces without a stack trace for each node, which nothing here reads.

    Threads that trace meanwhile get none either.
    """
    import torch.fx.config as config

    before = config.do_not_emit_stack_traces
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before
