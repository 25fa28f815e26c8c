"""Constants among the tensors that one operation of a Core ML program reads, as a class token between image tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evm_deploy.export import ExportPlan, export
from evm_deploy.model import Network
from tests.toolchains import need

need("coremltools", module=True)


class ClassToken(nn.Module):
    """Vim: the token stands in the middle, and is added a second time behind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        token = self.token.expand(x.shape[0], -1, -1)
        return torch.cat([tokens[:, :2], token, tokens[:, 2:], token], 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_constant_between_tensors(precision, tmp_path):
    network = Network.of(ClassToken(), torch.rand(1, 3, 8, 8))
    parity = export(network, ExportPlan("coreml", precision), tmp_path).manifest.parity
    assert parity["ok"] and parity["max_abs"] < (1e-5 if precision == "fp32" else 1e-2)
