"""BatchNorm inside convolutions: graphs for ONNX, modules for Core ML, whatever holds the two layers."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from evm_deploy.export.coreml.fold_batch_norm import fold_batch_norm as fold_modules
from evm_deploy.export.hub import fold_batch_norm as graph_pass
from evm_deploy.export.hub.naming import name_after_modules
from evm_deploy.export.hub.torchlib import unparsed_torchlib
from evm_deploy.model.batch_norm import folded, folded_modules

NORM = "BatchNormalization"


class Attributes(nn.Module):
    """`conv` and `bn` as attributes, norm and activation in forward."""

    def __init__(self, conv, bn):
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Twice(Attributes):
    """The convolution's output is read by another node beside the norm."""

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class SharedWeight(nn.Module):
    """Two convolutions of one weight, only the first with a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.bn, self.second = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.bn(self.first(x)) * self.second(x)


class CalledTwice(nn.Module):
    """One convolution that runs twice, with a norm each time."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.b(self.conv(self.a(self.conv(x))))


class AfterActivation(Attributes):
    def forward(self, x):
        return self.bn(F.relu(self.conv(x)))


class Output(Attributes):
    """The norm gives the output of the network."""

    def forward(self, x):
        return self.bn(self.conv(x))


CASES = {  # module, rank of its input, norms that stay in the graph, norms that stay in the module
    "attributes": (lambda: Attributes(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)), 4, 0, 0),
    "no_bias": (lambda: Attributes(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps=1e-3)), 4, 0, 0),
    "no_affine": (lambda: Attributes(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)), 4, 0, 0),
    "groups": (lambda: Attributes(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), 4, 0, 0),
    "sequential": (lambda: nn.Sequential(nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6)), 4, 0, 0),
    "one_dimension": (lambda: Attributes(nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), 3, 0, 0),
    "three_dimensions": (lambda: Attributes(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)), 5, 0, 0),
    "output": (lambda: Output(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), 4, 0, 0),
    "shared_weight": (SharedWeight, 4, 0, 0),
    "called_twice": (CalledTwice, 4, 0, 2),
    "read_twice": (lambda: Twice(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), 4, 1, 1),
    "after_activation": (lambda: AfterActivation(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), 4, 1, 1),
    "no_statistics": (
        lambda: Attributes(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), 4, 1, 1,
    ),
}  # fmt: skip


def made(case, seed=0):
    """The module of a case, all of its statistics random, and an input."""
    torch.manual_seed(seed)
    make, rank, _, _ = CASES[case]
    module = make().eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        for value in (norm.weight, norm.bias, norm.running_mean):
            if value is not None:
                nn.init.normal_(value)
        if norm.running_var is not None:
            norm.running_var.uniform_(0.2, 3)
    return module, torch.randn(2, 4, *[9] * (rank - 2))


def exported(module, x):
    """Export a module as the hub does."""
    with unparsed_torchlib():
        return torch.onnx.export(module, (x,), dynamo=True, verbose=False, optimize=False, output_names=["y"])


def norms(program):
    return sum(node.op_type == NORM for node in program.model.graph)


@functools.cache
def traced(case):
    """Trace, fold, optimise and name the module of a case as the hub does."""
    program = exported(*made(case))
    before = norms(program)
    assert before - graph_pass.fold_batch_norm(program.model) == norms(program)
    program.optimize()
    proto = program.model_proto
    name_after_modules(proto, root="model")
    onnx.checker.check_model(proto, full_check=True)
    return proto


def close(got, want):
    return np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("case", CASES)
def test_graphs(case):
    module, x = made(case)
    proto = traced(case)
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds[NORM] == CASES[case][2]
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        assert close(session.run(["y"], {proto.graph.input[0].name: x.numpy()})[0], module(x).numpy())
    assert (
        not [t.name for t in proto.graph.initializer if "running" in t.name or t.name.startswith("bn.")] or kinds[NORM]
    )


@pytest.mark.parametrize("case", ["attributes", "no_bias", "no_affine"])
def test_a_folded_convolution_keeps_its_names(case):
    """The exporter's own folding would call the node bn/Conv, and its new bias conv.weight_bias."""
    proto = traced(case)
    (conv,) = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert conv.name == "conv/Conv"
    assert list(conv.input[1:]) == ["conv.weight", "conv.bias"]


def test_weights_that_others_read_stay():
    module, _ = made("shared_weight")
    tensors = {t.name: numpy_helper.to_array(t) for t in traced("shared_weight").graph.initializer}
    np.testing.assert_array_equal(tensors["second.weight"], module.second.weight.detach())
    (weight, bias) = folded_modules(module.first, module.bn)
    np.testing.assert_array_equal(tensors["second.weight_1"], weight)
    np.testing.assert_array_equal(tensors["second.bias_1"], bias)


@pytest.mark.parametrize("case", CASES)
def test_modules(case):
    module, x = made(case)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    folded_module = fold_modules(module, x)
    kinds = [type(m) for m in folded_module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(kinds) == CASES[case][3]
    with torch.inference_mode():
        assert close(folded_module(x).numpy(), module(x).numpy())
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("case", ["attributes", "no_bias", "no_affine", "groups", "one_dimension"])
def test_a_module_and_its_graph_fold_to_the_same_bits(case):
    """So that a fused operator's operands are found among the constants of a graph."""
    module, _ = made(case)
    tensors = {t.name: numpy_helper.to_array(t) for t in traced(case).graph.initializer}
    for name, value in zip(("conv.weight", "conv.bias"), folded_modules(module.conv, module.bn), strict=True):
        np.testing.assert_array_equal(tensors[name], value.numpy())


def test_the_arithmetic_is_wide():
    """A float32 would lose what is left of a bias and a mean that nearly cancel."""
    one = np.ones(1, np.float32)
    weight, bias = folded(np.full((1, 1), 3, np.float32), one, one, 0 * one, one - np.float32(1e-7), one, 0.0)
    assert (weight.dtype, bias.dtype) == (np.float32, np.float32)
    assert weight.item() == 3
    assert bias.item() == float(one.item() - np.float64(np.float32(1) - np.float32(1e-7)))
