"""A visual Mamba of nobody's: what a network that evm-deploy has never seen may look like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evm_deploy.model import Network
from evm_deploy.scan.op import selective_scan

WIDTH, STATES, RANK, CLASSES = 16, 4, 3, 10
OUTPUTS = ("logits", "map")


class ToyBlock(nn.Module):
    """A scan over tokens, called channels first as most Mambas do: (b, d, L) -> (b, d, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.x_proj = nn.Linear(WIDTH, RANK + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(RANK, WIDTH)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, STATES + 1)).repeat(WIDTH, 1))
        self.D = nn.Parameter(torch.ones(WIDTH))
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x.transpose(1, 2)).transpose(1, 2)
        projected = self.x_proj(u.transpose(1, 2))
        dt, B, C = torch.split(projected, [RANK, STATES, STATES], dim=-1)
        delta = F.linear(dt, self.dt_proj.weight).transpose(1, 2)
        y = scan_channels_first(
            u, delta, -torch.exp(self.A_log), B.transpose(1, 2), C.transpose(1, 2), self.D, self.dt_proj.bias
        )
        return x + self.out_proj(y.transpose(1, 2)).transpose(1, 2)


def scan_channels_first(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """u, delta (b, d, L); A (d, N); B, C (b, N, L); D, bias (d,) -> (b, d, L): transposed before and after our op."""
    last = [x.transpose(1, 2).unsqueeze(1) for x in (u, delta, B, C)]
    y = selective_scan(last[0], last[1], A[None], last[2], last[3], D[None], bias[None])
    return y.squeeze(1).transpose(1, 2)


class ToyMamba(nn.Module):
    """Padded 3x3 stem, convolution and BatchNorm as attributes, a Conv1d, blocks, one of them called twice.

    (b, 3, H, W) -> logits (b, 10), and a map (b, 16, H/4, W/4) that is no classifier's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.reduce = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        self.shared = ToyBlock()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.reduce(F.silu(self.bn(self.conv(x))))
        b, c, h, w = x.shape
        tokens = F.silu(self.mix(x.flatten(2)))
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.shared(self.shared(tokens))
        return self.head(tokens.mean(-1)), tokens.reshape(b, c, h, w)


def toy_network() -> Network:
    """Seeded weights and running statistics, as after training."""
    torch.manual_seed(0)
    module = ToyMamba()
    with torch.no_grad():
        assert module.bn.running_mean is not None and module.bn.running_var is not None
        module.bn.running_mean.uniform_(-0.5, 0.5)
        module.bn.running_var.uniform_(0.5, 2.0)
        module.bn.weight.uniform_(0.5, 1.5)
    return Network.of(module, outputs=OUTPUTS, task="classification", num_classes=CLASSES, min_pixels=4)
