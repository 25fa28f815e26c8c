"""Adaptive pooling in the hub graph: the kinds of nodes, and the same result as torch for sizes that do not divide."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from evm_deploy.export.hub.graph import trace
from evm_deploy.export.hub.pooling import window_means
from evm_deploy.export.plan import Batch, ExportPlan


class Pooled(nn.Module):
    """A convolution and a pooling layer, as `trace` takes it."""

    outputs = ("y",)
    channels = 3

    def __init__(self, pool, flat):
        super().__init__()
        self.conv, self.pool, self.flat = nn.Conv2d(3, 4, 3, padding=1), pool, flat

    def forward(self, x):
        x = self.conv(x)
        return (self.pool(x.flatten(2) if self.flat else x),)


@pytest.mark.parametrize(
    ("pool", "flat", "kinds"),
    [
        (nn.AdaptiveAvgPool2d(1), False, ["ReduceMean"]),
        (nn.AdaptiveAvgPool2d((4, 7)), False, ["AveragePool"]),
        (nn.AdaptiveAvgPool2d((4, 5)), False, ["MatMul", "MatMul"]),
        (nn.AdaptiveAvgPool2d((1, 3)), False, ["MatMul", "MatMul"]),
        (nn.AdaptiveAvgPool2d((20, 30)), False, ["MatMul", "MatMul"]),
        (nn.AdaptiveAvgPool2d((None, 5)), False, ["MatMul"]),
        (nn.AdaptiveAvgPool2d((16, 14)), False, []),
        (nn.AdaptiveAvgPool1d(9), True, ["MatMul"]),
    ],
)
@pytest.mark.parametrize("batch", ["1", "1:2:4"])
def test_the_result_of_torch_in_few_nodes(pool, flat, kinds, batch):
    torch.manual_seed(0)
    module = Pooled(pool, flat).eval()
    plan = ExportPlan("onnx", "fp32", input="tensor", imgsz=(16, 14), batch=Batch.parse(batch))
    graph = trace(module, plan, {}).model
    moves = ("Conv", "Reshape", "Squeeze", "Unsqueeze", "Shape", "Gather", "Concat", "Slice")
    assert Counter(node.op_type for node in graph.graph.node if node.op_type not in moves) == Counter(kinds)
    assert not any(tensor.data_type == tensor.INT64 and np.prod(tensor.dims) > 8 for tensor in graph.graph.initializer)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.rand(int(batch[-1]), 3, 16, 14)
    with torch.no_grad():
        (want,) = module(x)
    (have,) = session.run(None, {"tensor": x.numpy()})
    np.testing.assert_allclose(have, want, atol=1e-6)


@pytest.mark.parametrize(("size", "wanted"), [(1, 1), (7, 1), (7, 7), (7, 3), (3, 7), (10, 4), (1, 5)])
def test_windows_are_those_of_torch(size, wanted):
    x = torch.rand(2, 3, size, dtype=torch.float64)
    want = nn.functional.adaptive_avg_pool1d(x, wanted)
    np.testing.assert_allclose(x.numpy() @ window_means(size, wanted).T, want, rtol=1e-6)
