"""Networks that mix the images of a batch, as MobileMamba's form for the CPU does: right in an artifact of batch 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evm_deploy.errors import ParityError
from evm_deploy.export import ExportPlan, export
from evm_deploy.model import Network


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.layer(x)
        return y + y.view(x.shape[0], 1, *y.shape[1:]).sum(0)  # (b, ..) + (1, ..), meant as (b, ..) + (b, ..)


def test_a_network_that_mixes_images_is_exported_for_one(tmp_path):
    network = Network.of(Mixes(), torch.rand(1, 3, 8, 8))
    parity = export(network, ExportPlan("onnx", "fp32"), tmp_path).manifest.parity
    assert parity["ok"] and parity["max_abs"] < 1e-5 and parity["images"] == 3
    with pytest.raises(ParityError, match="output differ"):
        export(network, ExportPlan("onnx", "fp32", batch=3), tmp_path / "of_three")


class Keeps(nn.Module):
    """Keeps a number that it computes from the batch of its first run, as MambaVision's windows."""

    def __init__(self):
        super().__init__()
        self.batch = 0

    def forward(self, x):
        self.batch = self.batch or x.shape[0]
        return x.reshape(self.batch, 3, *x.shape[2:]).mean(1)


def test_a_network_that_keeps_its_first_batch_is_exported(tmp_path):
    network = Network.of(Keeps(), torch.rand(1, 3, 8, 8))
    assert export(network, ExportPlan("onnx", "fp32"), tmp_path).manifest.parity["ok"]
