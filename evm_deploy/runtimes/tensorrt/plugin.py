"""AOT plugin evm::SelectiveScan for TensorRT 10.9 or newer. The engine contains the kernel and needs no evm-deploy.

This module has no `from __future__ import annotations`, because tensorrt.plugin reads annotations as objects. For the
same reason, annotations use `typing.List` and the like.
"""
# ruff: noqa: UP006, UP007, UP035

from typing import Any, List, Tuple, Union

from evm_deploy.runtimes.tensorrt.kernel import CHANNELS, KERNELS, THREADS

OP = "evm::SelectiveScan"
TACTIC = 1  # number of the only tactic


def register(code: Union[str, bytes], lazy: bool = False) -> Any:
    """Register the op with TensorRT. Call this function before parsing nodes that have plugin_namespace "evm".

    These nodes also have plugin_version "1" and aot 1. code: PTX or CUBIN of the kernels, for the GPU of the engine.
    lazy: register at the first use from Python. Returns the functions for autotuning and for the AOT implementation.
    Raises ImportError if TensorRT has no `tensorrt.plugin`.
    """
    import tensorrt as trt
    import tensorrt.plugin as trtp

    @trtp.register(OP, lazy_register=lazy)  # type: ignore[untyped-decorator]
    def describe(
        u: trtp.TensorDesc,
        delta: trtp.TensorDesc,
        A: trtp.TensorDesc,
        B: trtp.TensorDesc,
        C: trtp.TensorDesc,
        skip: trtp.TensorDesc,
        bias: trtp.TensorDesc,
    ) -> trtp.TensorDesc:
        return u.like()

    @trtp.autotune(OP)  # type: ignore[untyped-decorator]
    def autotune(
        u: trtp.TensorDesc,
        delta: trtp.TensorDesc,
        A: trtp.TensorDesc,
        B: trtp.TensorDesc,
        C: trtp.TensorDesc,
        skip: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        outputs: Tuple[trtp.TensorDesc],
    ) -> List[trtp.AutoTuneCombination]:
        either = "FP32|FP16"  # all tensors with this type have the same one of the two
        types = f"{either}, {either}, FP32, {either}, {either}, FP32, FP32, {either}"
        return [trtp.AutoTuneCombination(types, "LINEAR", [TACTIC])]

    @trtp.aot_impl(OP)  # type: ignore[untyped-decorator]
    def implement(
        u: trtp.TensorDesc,
        delta: trtp.TensorDesc,
        A: trtp.TensorDesc,
        B: trtp.TensorDesc,
        C: trtp.TensorDesc,
        skip: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        outputs: Tuple[trtp.TensorDesc],
        tactic: int,
    ) -> Tuple[Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymExprs]:
        batch, K, L, D = u.shape_expr
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = trtp.cdiv(D, CHANNELS), K, batch
        launch.block_x, launch.shared_mem = THREADS, 0
        integers = trtp.SymIntExprs(3)
        for i, value in enumerate((L, D, A.shape_expr[2])):
            integers[i] = trtp.SymInt32(value)
        return KERNELS["float16" if u.dtype == trt.float16 else "float32"], code, launch, integers

    return autotune, implement
