"""The plugin definition against the `tensorrt.plugin` package of a TensorRT wheel: its own checks, no library, no GPU.

The package is pure Python; what it takes from TensorRT's bindings comes from TensorRT-RTX's, and from stand-ins below.
The wheel of the bindings (tensorrt_cu13_bindings) is installed without its libraries, so that nothing can import it.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
from pathlib import Path

import pytest

from evm_deploy.runtimes.tensorrt import kernel
from evm_deploy.runtimes.tensorrt import plugin as tensorrt_plugin
from evm_deploy.scan import onnx_function
from tests.toolchains import need

# b, K, L, D, N: the stages of T, S and B at 224, and odd ones
SIZES = [(1, 4, 784, 96, 16), (1, 4, 196, 192, 16), (2, 4, 784, 128, 16), (1, 4, 196, 256, 16), (3, 2, 35, 13, 5)]


class IntExpr:
    """An IDimensionExpr whose value is known."""

    def __init__(self, value):
        self.value = value

    def is_constant(self):
        return True

    def get_constant_value(self):
        return self.value


@pytest.fixture
def trt(monkeypatch):
    need("TensorRT-RTX", "TensorRT's Python")
    rtx = importlib.import_module("tensorrt_rtx_bindings")
    folder = Path(importlib.util.find_spec("tensorrt_bindings").origin).parent / "plugin"

    class IntBuilder:
        def constant(self, value):
            return IntExpr(value)

        def operation(self, op, a, b):
            kinds = rtx.DimensionOperation
            compute = {
                kinds.SUM: lambda x, y: x + y,
                kinds.PROD: lambda x, y: x * y,
                kinds.CEIL_DIV: lambda x, y: -(-x // y),
            }[op]
            return IntExpr(compute(a.value, b.value))

    stub = types.ModuleType("tensorrt")
    stub.__dict__.update({key: value for key, value in vars(rtx).items() if not key.startswith("__")})
    names = "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
    stub.QuickPluginCreationRequest = enum.Enum("QuickPluginCreationRequest", names, start=0)
    for name in ("ISymExpr", "IPluginV3QuickAOTBuild"):
        setattr(stub, name, type(name, (), {"__init__": lambda self: None}))
    stub.IDimensionExpr, stub.IntBuilder = IntExpr, IntBuilder
    monkeypatch.setitem(sys.modules, "tensorrt", stub)
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", module)
    stub.plugin = module
    spec.loader.exec_module(module)
    yield stub
    for name in [name for name in sys.modules if name.startswith("tensorrt.plugin.")]:
        del sys.modules[name]


@pytest.fixture
def plugin(trt):
    return tensorrt_plugin.register("the code", lazy=True)


def describe(trt, batch, K, L, D, N, dtype):
    """The seven inputs as TensorRT describes them."""
    from tensorrt.plugin._tensor import ShapeExpr, ShapeExprs, SymIntExpr, TensorDesc

    SymIntExpr._exprBuilder = trt.IntBuilder()
    f32 = trt.float32
    shapes = ((batch, K, L, D), (batch, K, L, D), (K, D, N), (batch, K, L, N), (batch, K, L, N), (K, D), (K, D))
    kinds = (dtype, dtype, f32, dtype, dtype, f32, f32)
    return [
        TensorDesc(ShapeExprs.from_tuple(tuple(map(ShapeExpr, shape))), kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]


def test_the_signature_is_the_ops(plugin):
    from tensorrt.plugin._lib import QDP_REGISTRY

    known = QDP_REGISTRY[tensorrt_plugin.OP]
    assert tuple(known.input_tensor_names) == onnx_function.INPUTS
    assert (dict(known.input_attrs), known.num_outputs) == ({}, 1)


def test_float_or_half_together_around_float_constants(plugin, trt):
    (combination,) = plugin[0](*[None] * 8)
    found = {tuple(kind.types) for kind in combination._get_combinations()}
    f32, f16 = trt.float32, trt.float16
    assert found == {(f32,) * 8, (f16, f16, f32, f16, f16, f32, f32, f16)}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_launch_is_the_emulated_one(plugin, trt, sizes, dtype):
    batch, K, L, D, N = sizes
    tensors = describe(trt, batch, K, L, D, N, getattr(trt, dtype))
    name, code, launch, integers = plugin[1](*tensors, (tensors[0],), tensorrt_plugin.TACTIC)
    grid = tuple(getattr(launch, f"grid_{axis}")._expr.value for axis in "xyz")
    assert grid == kernel.grid(batch, K, D)
    assert (launch.block_x._expr.value, launch.shared_mem._expr.value) == (kernel.THREADS, 0)
    assert [each._expr.value for each in integers] == [L, D, N]
    assert (name, code) == (kernel.KERNELS[dtype], "the code")


def test_the_package_refuses_a_wrong_signature(trt):
    """Negative control: its checks are at work."""
    with pytest.raises(ValueError):

        @trt.plugin.register("evm::Wrong", lazy_register=True)
        def describe(u, delta):
            return u
