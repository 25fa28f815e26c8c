"""Mamba packages of PyPI, unmodified and installed without their dependencies, through every target."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import nn

import evm_deploy
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.export.source import Source
from evm_deploy.export.targets import get_target
from evm_deploy.model import Network
from tests.fake_torchvision import torchvision
from tests.targets import MANY_NETWORKS
from tests.toolchains import need

pytestmark = pytest.mark.slow
WIDTH = 64
SIZE = (64, 96)


class OnPatches(nn.Module):
    """A layer of others on the patches of an image. tokens: (b, L, C) -> (b, L, C), else (b, H, W, C)."""

    def __init__(self, layer, tokens=True):
        super().__init__()
        self.stem, self.layer, self.tokens = nn.Conv2d(3, WIDTH, 8, stride=8), layer, tokens

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        if not self.tokens:
            return self.layer(x)
        return self.layer(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def seed(module):
    """Weights with which the recurrence matters: a small D, dt of 0.01 to 2."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf in ("D", "Ds", "D_b"):
                value.fill_(0.1)
            elif "dt" in name and (leaf.endswith("bias") or value.dim() < 2):
                value.copy_(torch.log(torch.expm1(torch.logspace(-2, 0.3, value.numel()).reshape(value.shape))))
            elif value.dim() > 1 and "A_log" not in leaf:
                value.copy_(torch.randn_like(value) / value[0].numel() ** 0.5)
    return module


def mambapy():
    vim = importlib.import_module("mambapy.vim")
    return OnPatches(vim.VMamba(vim.MambaConfig(d_model=WIDTH, n_layers=2, use_cuda=True)))


def bidirectional():
    package = importlib.import_module("bidirectional_mamba")
    return OnPatches(package.BiMambaStack(WIDTH, 1, d_state=32, headdim=32))


def opensr():
    with torchvision():  # the package imports timm for three small functions
        model = importlib.import_module("opensr_mamba.mamba.model")
    return OnPatches(model.SS2D(WIDTH, d_state=16), tokens=False)


def mambaout():
    with torchvision():
        return importlib.import_module("timm").create_model("mambaout_femto", pretrained=False, depths=(1, 1, 2, 1))


#: Scans; those of Mamba-2 are standard operations.
PACKAGES = {
    "mambapy": (mambapy, 4),
    "bidirectional": (bidirectional, 0),
    "opensr": (opensr, 1),
    "mambaout": (mambaout, 0),
}


@pytest.fixture(scope="module", params=PACKAGES)
def package(request):
    need("Mambas of PyPI")
    make, scans = PACKAGES[request.param]
    with evm_deploy.cpu_mamba():
        module = seed(make())
    return Source(Network.of(module, torch.rand(1, 3, *SIZE), name=request.param)), scans


@pytest.mark.parametrize("target", MANY_NETWORKS)
def test_a_package_of_others_on_every_target(target, package, tmp_path):
    source, scans = package
    for scan in ("auto", "portable"):
        manifest = export(source, ExportPlan(target, "fp32", scan=scan), tmp_path / scan).manifest
        parity = manifest.parity
        scale = parity["limit"] / ExportPlan("onnx", "fp32").tolerance
        assert parity["ok"] and parity["max_abs"] <= (1e-5 if scans else 2e-5) * scale
        assert len({each["name"] for each in parity["scans"]}) == scans
        said = [note for note in manifest.notes if "Mamba-2 scans" in note or "has no scan" in note]
        assert len(said) == (0 if scans else 1)


@pytest.mark.parametrize("target", ["onnx", "openvino", "trt", "coreml"])
def test_int8_of_a_package_of_others(target, package, tmp_path):
    """Layers beside a scan stay in float; every block is named by its list; the outputs are compared by their error."""
    source, scans = package
    images = np.stack([synthetic_image(*SIZE, seed) for seed in range(16)])
    np.savez(tmp_path / "calib.npz", images=images)
    # Mamba-2 is standard operations: its projections become int8, and the largest difference passes the usual limit
    tol = 0.5 if source.name == "bidirectional" else None
    bits = 7 if 7 in get_target(target).weight_bits else None  # the same accuracy with and without VNNI
    calib = str(tmp_path / "calib.npz")
    plan = ExportPlan(target, "int8", imgsz=SIZE, calib=calib, force_calib=True, tol=tol, weight_bits=bits)
    manifest = export(source, plan, tmp_path).manifest
    accuracy, facts = manifest.accuracy, manifest.details["quantization"]
    assert accuracy and accuracy["ok"] and accuracy["sqnr_db"] >= 20 and facts["int8_layers"] >= 2
    assert 0 < accuracy["relative_error"] < 0.1 and accuracy["psnr_db"] > 20
    rounded = {name.rpartition(":")[0] for name in facts["calibration"]["activations"]}
    assert not [name for name in rounded if scans and name.endswith(("x_proj", "dt_proj", "out_proj", "conv1d"))]
