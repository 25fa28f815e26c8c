# ruff: noqa: N802, N815  names are those of CUDA
"""TensorRT's runtime against stand-ins: an engine that doubles its input, and CUDA whose device memory is the host's.

They check what the driver would: addresses that were given out, copies within them, events and captures on one stream,
nothing left at the end.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from evm_deploy.errors import ToolchainError
from evm_deploy.runtimes import tensorrt
from evm_deploy.runtimes.tensorrt import TensorRtRuntime, check_built_for


class Status(enum.Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class Kind(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Mode(enum.Enum):
    cudaStreamCaptureModeThreadLocal = 1


class Cuda:
    """The calls of cuda.bindings.runtime that are used; every one returns (status, values..)."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = Status, Kind, Mode

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array] = {}
        self.alive: set[object] = set()
        self.capturing: list | None = None
        self.calls: list[str] = []
        self.clock = 0.0
        self.full = False

    def __getattr__(self, name):
        """Creating and destroying what has no state."""
        if name in ("cudaStreamCreate", "cudaEventCreate"):
            return lambda: (Status.cudaSuccess, self._made(types.SimpleNamespace(at=None)))
        if name in ("cudaStreamDestroy", "cudaEventDestroy", "cudaGraphDestroy", "cudaGraphExecDestroy"):
            return lambda what: (self.alive.remove(id(what)), (Status.cudaSuccess,))[1]
        raise AttributeError(name)

    def _made(self, what):
        self.alive.add(id(what))
        self.kept = [*getattr(self, "kept", []), what]  # so that no id is used twice
        return what

    def do(self, name, action):
        """Now, or as part of the graph that is being captured."""
        if self.capturing is not None:
            self.capturing.append(action)
        else:
            self.calls.append(name)
            self.clock += 1.0
            action()
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size):
        if self.full:
            return Status.cudaErrorMemoryAllocation, None
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return Status.cudaSuccess, ctypes.addressof(buffer)

    def cudaFree(self, address):
        del self.memory[address]
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert id(stream) in self.alive
        device = to if kind is Kind.cudaMemcpyHostToDevice else source
        assert size <= len(self.memory[device])
        return self.do("copy", lambda: ctypes.memmove(to, source, size))

    def cudaEventRecord(self, event, stream):
        assert {id(event), id(stream)} <= self.alive
        event.at = self.clock
        return (Status.cudaSuccess,)

    def cudaEventElapsedTime(self, start, end):
        return Status.cudaSuccess, end.at - start.at

    def cudaStreamSynchronize(self, stream):
        assert self.capturing is None
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        graph = self._made(types.SimpleNamespace(actions=self.capturing))
        self.capturing = None
        return Status.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph, flags):
        return Status.cudaSuccess, self._made(types.SimpleNamespace(actions=list(graph.actions)))

    def cudaGraphLaunch(self, graph, stream):
        assert id(graph) in self.alive and id(stream) in self.alive
        return self.do("graph", lambda: [action() for action in graph.actions])


class Context:
    """y = 2 x of float32[batch, 3], on the memory that it was given."""

    def __init__(self, cuda) -> None:
        self.cuda, self.addresses, self.shape, self.works = cuda, {}, (), True

    def set_input_shape(self, name, shape):
        self.shape = shape

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        assert address in self.cuda.memory
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        count, addresses = int(np.prod(self.shape)), dict(self.addresses)

        def double():
            x, y = ((ctypes.c_float * count).from_address(addresses[name]) for name in ("x", "y"))
            y[:] = [2 * value for value in x]

        self.cuda.do("engine", double)
        return self.works


class Engine:
    num_io_tensors = 2

    def __init__(self, cuda) -> None:
        self.context = Context(cuda)

    def create_execution_context(self):
        return self.context

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_mode(self, name):
        return {"x": "input", "y": "output"}[name]

    def get_tensor_dtype(self, name):
        return "float32"

    def get_tensor_shape(self, name):
        return (-1, 3)


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """CUDA, the engine as `.engine` and a file for it as `.path`."""
    cuda = Cuda()
    cuda.engine, cuda.path = Engine(cuda), tmp_path / "model.engine"
    cuda.path.write_bytes(b"plan")
    logger = type("ILogger", (), {"__init__": lambda self: None, "Severity": types.SimpleNamespace(ERROR=1)})
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda plan: cuda.engine if plan == b"plan" else None)
    trt = types.SimpleNamespace(
        __version__="11.4.0",
        ILogger=logger,
        Runtime=lambda logger: runtime,
        TensorIOMode=types.SimpleNamespace(INPUT="input"),
        nptype=np.dtype,
    )
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda target: trt)
    for name, module in (("cuda", types.ModuleType("cuda")), ("cuda.bindings", types.ModuleType("cuda.bindings"))):
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["cuda.bindings"].runtime = cuda
    return cuda


def batch(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((size, 3), np.float32)}


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_runs_of_changing_batches_and_nothing_is_left(cuda, cuda_graph):
    with TensorRtRuntime(cuda.path, "trt", cuda_graph=cuda_graph) as runtime:
        assert (str(runtime.inputs["x"]), str(runtime.outputs["y"])) == ("x float32[batch, 3]", "y float32[batch, 3]")
        for seed, size in enumerate((2, 2, 2, 5, 5, 1, 1, 1, 2, 7, 7, 7)):
            feeds = batch(size, seed)
            np.testing.assert_array_equal(runtime.run(feeds)["y"], 2 * feeds["x"])
        assert len(cuda.memory) == 2
    assert not cuda.memory and not cuda.alive


def test_arrays_of_any_layout_and_results_that_stay(cuda):
    with TensorRtRuntime(cuda.path, "trt") as runtime:
        x = np.asfortranarray(batch(4)["x"])
        first = runtime.run({"x": x})["y"]
        runtime.run(batch(4, 1))
        np.testing.assert_array_equal(first, 2 * x)


def test_a_graph_is_captured_in_the_second_run_and_launched_from_then_on(cuda):
    with TensorRtRuntime(cuda.path, "trt", cuda_graph=True) as runtime:
        for seed in range(4):
            runtime.run(batch(2, seed))
        assert [call for call in cuda.calls if call != "copy"] == ["engine", "graph", "graph", "graph"]
        cuda.calls.clear()
        runtime.run(batch(3))
        assert [call for call in cuda.calls if call != "copy"] == ["engine"]


def test_transfers_are_counted_apart(cuda):
    with TensorRtRuntime(cuda.path, "trt") as runtime:
        assert runtime.milliseconds == {}
        runtime.run(batch(2))
        assert runtime.milliseconds == {"inputs": 1.0, "compute": 1.0, "outputs": 1.0}


def test_an_engine_that_fails(cuda):
    with TensorRtRuntime(cuda.path, "trt") as runtime:
        cuda.engine.context.works = False
        with pytest.raises(ToolchainError, match="the engine failed"):
            runtime.run(batch(2))
    assert not cuda.memory and not cuda.alive


def test_a_device_without_memory(cuda):
    with TensorRtRuntime(cuda.path, "trt") as runtime:
        runtime.run(batch(1))
        cuda.full = True
        with pytest.raises(ToolchainError, match="CUDA: cudaErrorMemoryAllocation"):
            runtime.run(batch(1000))
    assert not cuda.memory and not cuda.alive


def test_an_engine_of_another_release(cuda):
    manifest = '{"details": {"engine": {"tensorrt": "10.3.0"}}}'
    Path(cuda.path.parent / "manifest.json").write_text(manifest)
    with pytest.raises(ToolchainError, match=r"built with TensorRT 10\.3\.0, but 11\.4\.0 is installed"):
        TensorRtRuntime(cuda.path, "trt")


def test_a_plan_behind_a_length_and_json(cuda):
    header = b'{"names": []}'
    cuda.path.write_bytes(len(header).to_bytes(4, "little") + header + b"plan")
    with TensorRtRuntime(cuda.path, "trt") as runtime:
        np.testing.assert_array_equal(runtime.run(batch(1))["y"], 2 * batch(1)["x"])
    cuda.path.write_bytes(b"not a plan")
    with pytest.raises(ToolchainError, match="cannot be opened"):
        TensorRtRuntime(cuda.path, "trt")


@pytest.mark.parametrize(
    "content", [[], {}, {"details": []}, {"details": {"engine": [1]}}, {"plan": {"settings": "x"}}]
)
def test_a_manifest_of_any_shape_beside_an_engine_is_no_crash(content, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    check_built_for(tmp_path / "model.engine", "10.9")


def test_an_engine_of_another_release_is_still_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"details": {"engine": {"tensorrt": "10.1"}}}))
    with pytest.raises(ToolchainError, match=r"built with TensorRT 10\.1"):
        check_built_for(tmp_path / "model.engine", "10.9")
    compatible = {"details": {"engine": {"tensorrt": "10.1"}}, "plan": {"engine": {"version_compatible": True}}}
    (tmp_path / "manifest.json").write_text(json.dumps(compatible))
    check_built_for(tmp_path / "model.engine", "10.9")
