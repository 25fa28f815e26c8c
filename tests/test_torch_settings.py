"""Exports inside a host program that has changed torch's global settings: the same bundle, and nothing changed."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from evm_deploy import load, load_checkpoint
from evm_deploy._util.torch_settings import default_torch_settings, no_stack_traces
from evm_deploy.export import ExportPlan, export
from evm_deploy.model import Network
from tests.toy import WIDTH, ToyBlock

SETTERS = {
    "double": lambda stack: (
        stack.callback(torch.set_default_dtype, torch.float32),
        torch.set_default_dtype(torch.double),
    ),
    "half": lambda stack: (stack.callback(torch.set_default_dtype, torch.float32), torch.set_default_dtype(torch.half)),
    "autocast": lambda stack: stack.enter_context(torch.autocast("cpu", torch.bfloat16)),
    "meta": lambda stack: (stack.callback(torch.set_default_device, None), torch.set_default_device("meta")),
    "device block": lambda stack: stack.enter_context(torch.device("meta")),
    "inference": lambda stack: stack.enter_context(torch.inference_mode()),
    "no grad": lambda stack: stack.enter_context(torch.no_grad()),
    "deterministic": lambda stack: (
        stack.callback(torch.use_deterministic_algorithms, False),
        torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "products": lambda stack: (
        stack.callback(torch.set_float32_matmul_precision, "highest"),
        torch.set_float32_matmul_precision("medium"),
    ),
    "anomalies": lambda stack: stack.enter_context(torch.autograd.detect_anomaly(check_nan=True)),
    "threads": lambda stack: (stack.callback(torch.set_num_threads, 1), torch.set_num_threads(2)),
}


def settings():
    """Everything that the setters change, by the tensors that a host would make and by torch's own words."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.zeros(1).device,
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_anomaly_enabled(),
        torch.get_num_threads(),
    )


@pytest.fixture(params=SETTERS)
def host(request):
    before = settings()
    with contextlib.ExitStack() as stack:
        SETTERS[request.param](stack)
        assert settings() != before
        yield
    assert settings() == before


@pytest.mark.filterwarnings("ignore")
def test_inside_the_block_everything_is_default_and_after_it_nothing_is(host):
    before = settings()
    with default_torch_settings():
        assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
        assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.half)
    assert settings() == before
    with pytest.raises(ZeroDivisionError), default_torch_settings():
        1 / 0  # noqa: B018
    assert settings() == before


def test_nodes_are_traced_without_stack_traces_in_the_block_alone():
    def recorded():
        nodes = torch.export.export(nn.ReLU(), (torch.ones(1),)).graph.nodes
        return [bool(node.stack_trace) for node in nodes if node.op == "call_function"]

    with pytest.raises(ZeroDivisionError), no_stack_traces():
        assert recorded() == [False]
        1 / 0  # noqa: B018
    assert recorded() == [True]


@pytest.fixture(scope="module")
def plain(micro):
    return load_checkpoint(micro).module.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_load_alike(micro, plain, host):
    for head in ("logits", "features"):
        for key, value in load_checkpoint(micro, head=head).module.state_dict().items():
            assert value.device.type == "cpu"
            if key in plain:
                assert value.dtype == plain[key].dtype
                assert np.array_equal(value.numpy(), plain[key].numpy())


class OneBlock(nn.Module):
    """A convolution, a norm, a block with a scan, a classifier: what settings may change, and no more to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, WIDTH, 4, stride=4, bias=False), nn.BatchNorm2d(WIDTH)
        self.block, self.head = ToyBlock(), nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.head(self.block(torch.relu(self.bn(self.conv(x))).flatten(2)).mean(-1))


@pytest.fixture(scope="module")
def small():
    """A network made before the host changes the settings."""
    return Network.of(OneBlock(), outputs=("logits",), task="classification", num_classes=10, min_pixels=4)


@pytest.mark.slow
@pytest.mark.retraces
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_exports_are_alike(small, tmp_path, target, host):
    """Each export is traced anew."""
    before = settings()
    bundle = export(small, ExportPlan(target, imgsz=32), tmp_path)
    assert settings() == before
    with load(bundle.path) as model:
        assert all(check.ok for check in model.selftest())
    assert settings() == before
