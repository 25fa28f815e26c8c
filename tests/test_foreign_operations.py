"""Operations of networks of others that visual Mambas write: each as torch computes it, on every target that has it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.network import Network
from tests.test_foreign_export import Returns


def strided_writes(y):
    """Write to every second row and column, as a cross scan is merged, and to places of other steps and signs."""
    out = torch.zeros_like(y)
    out[:, :, ::2, ::2] = y[:, :, 1::2, 1::2]
    out[:, :, 1::2, ::2] = y[:, :, ::2, ::2]
    out[:, 1:7:3, -5:, 3::4] += 1
    out[:, ::2, 1:-1, 2] = 0
    out[:, :, 0] -= 1
    return out


def attention(y):
    """Attention of three and of five dimensions, with every kind of mask."""
    b, c, h, w = y.shape
    t = y.flatten(2).transpose(1, 2)
    added = torch.zeros(1, h * w, h * w).masked_fill(torch.ones(h * w, h * w).triu(9)[None] > 0, -9.0)
    of_three = sum(
        F.scaled_dot_product_attention(t, t, t, **options)
        for options in (
            {},
            {"attn_mask": added},
            {"attn_mask": added[0]},
            {"attn_mask": added[0] == 0},
            {"is_causal": True},
            {"scale": 0.2},
        )
    )
    five = y[None].repeat(1, 2, 1, 1, 1)
    return of_three.transpose(1, 2).reshape(b, c, h, w) + F.scaled_dot_product_attention(five, five, five)[0, :1]


class Everywhere(nn.Module):
    """Network of operations that every target has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x):
        y = self.conv(x)
        return strided_writes(y) + attention(y) + F.avg_pool2d(self.up(y), 2)


class InCoreMl(nn.Module):
    """Network of operations that the MIL runtime has: access by index and mask, orders, borders, triangles."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        order = y.argsort(1)
        masked = y.clone()
        masked[y > 0.5] = 0
        total = torch.gather(y, 1, order) + torch.zeros_like(y).scatter(1, order, y) + masked
        total = total + y.scatter_add(1, torch.zeros(1, 1, *y.shape[2:], dtype=torch.long), y[:, :1]) + y.sort(3)[0]
        padded = F.pad(F.pad(y, (1, 2, 0, 3), mode="reflect"), (0, 1, 1, 0), mode="replicate")
        total = total + padded[..., : y.shape[2], : y.shape[3]] + torch.tril(y) + 2 * torch.triu(y, 1)
        return total + torch.logsumexp(y, 1, keepdim=True)


@pytest.mark.parametrize(
    "target",
    ["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("openvino", "executorch", "litert", "coreml"))],
)
def test_what_every_target_has(target, tmp_path):
    if target == "litert":
        pytest.importorskip("ai_edge_litert")
    plan = ExportPlan(target, imgsz=(12, 16), precision="fp16" if target == "coreml" else "fp32")
    bundle = export(Network.of(Everywhere(), outputs=["y"]), plan, tmp_path)
    assert bundle.manifest.parity["ok"]


@pytest.mark.slow
def test_what_core_ml_has(tmp_path):
    bundle = export(Network.of(InCoreMl(), outputs=["y"]), ExportPlan("coreml", "fp32", imgsz=(12, 16)), tmp_path)
    assert bundle.manifest.parity["ok"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: y.mean(), r"output y of the network is float32\[\], but an artifact gives real numbers"),
        (lambda y: y.flatten(2).transpose(1, 2)[0], r"output y of the network is float32\[64, 4\], .* here \[1, ..\]"),
        (lambda y: y.mean((2, 3)) > 0, r"output y of the network is bool\[1, 4\]"),
        (lambda y: y.to_sparse(), r"output y of the network is sparse_coo\[1, 4, 8, 8\]"),
        (lambda y: y[:, :0], r"output y of the network is float32\[1, 0, 8, 8\]"),
        (lambda y: torch.fft.rfft2(y), r"output y of the network is complex64\["),
    ],
)
def test_outputs_that_no_artifact_has(function, message):
    with pytest.raises(UsageError, match=message) as raised:
        Network.of(Returns(lambda y: {"y": function(y)}), torch.rand(1, 3, 8, 8))
    assert "return another shape" in raised.value.hint


@pytest.mark.parametrize("target", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_one_tensor_as_two_outputs(target, tmp_path):
    given = Network.of(Returns(lambda y: {"a": y, "b": y}), torch.rand(1, 3, 8, 8))
    bundle = export(given, ExportPlan(target, "fp32", imgsz=(8, 8), scan="portable"), tmp_path)
    assert bundle.manifest.parity["ok"] and [each["name"] for each in bundle.manifest.outputs] == ["a", "b"]


@pytest.mark.slow
def test_one_tensor_is_one_output_of_core_ml(tmp_path):
    given = Network.of(Returns(lambda y: {"a": y, "b": y}), torch.rand(1, 3, 8, 8))
    with pytest.raises(
        UsageError, match=r"Core ML gives one tensor as one output: \w of the network is another output"
    ):
        export(given, ExportPlan("coreml", "fp32", imgsz=(8, 8)), tmp_path)


def test_a_network_that_returns_nothing():
    with pytest.raises(UsageError, match="the network returns nothing"):
        Network.of(Returns(lambda y: None), torch.rand(1, 3, 8, 8))


def test_attention_of_grouped_queries_is_refused_by_its_name(tmp_path):
    def grouped(y):
        t = y.flatten(2)
        return F.scaled_dot_product_attention(t, t[:1], t[:1], enable_gqa=True)

    given = Network.of(Returns(grouped), outputs=["y"])
    with pytest.raises(UsageError, match="attention with enable_gqa of 3 dimensions cannot be exported"):
        export(given, ExportPlan("onnx", "fp32", imgsz=(8, 8)), tmp_path)


def test_what_openvino_cannot_convert_is_a_line(tmp_path):
    given = Network.of(Returns(lambda y: F.pad(y, (2, 2, 2, 2), mode="circular")), outputs=["y"])
    with pytest.raises(
        ToolchainError, match=r"OpenVINO cannot convert the network: .*: Unsupported padding mode"
    ) as said:
        export(given, ExportPlan("openvino", "fp32", imgsz=(8, 8), scan="portable"), tmp_path)
    assert "\n" not in said.value.args[0]
