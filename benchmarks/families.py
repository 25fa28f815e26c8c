"""Export networks of public Mamba repositories and measure them: the table of docs/families.md.

    python benchmarks/families.py FOLDER [NAME ..] [--targets onnx,openvino,coreml,trt] [-o families.json]

FOLDER holds a git clone of each repository under its own name: VMamba, Vim, LocalMamba. A missing clone or a package
that a repository needs (timm, einops, fvcore, pywavelets ..) is the row's reason. Weights are random, from a seed: the
repository's own initialisation, and then a small D and steps dt of 0.01 to 2 where the repository's are so small that
the recurrence would not be seen. Each network is exported by `evm-export --model` in a process of its own. The script
prints one row for each network, and keeps all figures in a JSON file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

COMMANDS = Path(sys.executable).parent
TARGETS = "onnx,openvino,coreml,trt"


@dataclass(frozen=True)
class Case:
    """A network of a repository.

    folders: for Python's path, below the folder of clones; the first one becomes the working directory. make: returns
    the module. size: side of the image in pixels. paper: side of the image in the paper.
    """

    folders: tuple[str, ...]
    make: Callable[[], nn.Module]
    size: int
    paper: int = 224


def made(where: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """Return a function that imports `module:name` and calls it."""
    module, _, name = where.partition(":")
    return lambda: getattr(importlib.import_module(module), name)(*args, **kwargs)


class OnPatches(nn.Module):
    """A layer of tokens (b, L, C) -> (b, L, C) on the patches of 8 x 8 pixels of an image (b, 3, H, W)."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, width, 8, stride=8), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer on the patches."""
        y: torch.Tensor = self.layer(self.stem(x).flatten(2).transpose(1, 2))
        return y


def on_patches(where: str, width: int, **kwargs: Any) -> Callable[[], nn.Module]:
    """Return a function that makes a layer and puts it on patches."""
    return lambda: OnPatches(made(where, width, **kwargs)(), width)


VIM = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
VSSD = dict(
    embed_dim=48, depths=[2, 2, 8, 4], num_heads=[2, 4, 8, 16], d_state=48, simple_downsample=False,
    simple_patch_embed=False, ssd_expansion=2, ssd_chunk_size=256, ssd_positve_dA=True,
    attn_types=["mamba2", "mamba2", "mamba2", "standard"],
)  # fmt: skip
LIGHT = dict(img_size=64, embed_dim=60, d_state=10, depths=(6, 6, 6, 6), mlp_ratio=1.2, upscale=2)
CASES = {
    "VMamba v05 tiny_s1l8": Case(("VMamba/classification",), made("models.vmamba:vmamba_tiny_s1l8"), 224),
    "VMamba v0 tiny": Case(("VMamba/classification",), made("models.vmamba:vanilla_vmamba_tiny"), 224),
    "VMamba m2 tiny": Case(("VMamba/classification",), made("models.vmamba:vmamba_tiny_m2"), 224),
    "Vim tiny": Case(("Vim/vim", "Vim/mamba-1p1p1"), made(f"models_mamba:{VIM}"), 224),
    "Vim tiny, no mamba_ssm": Case(("Vim/vim",), made(f"models_mamba:{VIM}"), 224),
    "LocalVMamba tiny": Case(("LocalMamba/classification",), made("lib.models.local_vmamba:local_vssm_tiny"), 224),
    "LocalVim tiny": Case(("LocalMamba/classification",), made("lib.models.local_vim:local_vim_tiny"), 224),
    "MedMamba tiny": Case(("MedMamba",), made("MedMamba:VSSM", depths=[2, 2, 4, 2], num_classes=6), 224),
    "VM-UNet": Case(("VM-UNet",), made("models.vmunet.vmunet:VMUNet", 3, 1, [2, 2, 2, 2], [2, 2, 2, 1]), 256, 256),
    "MambaIR light x2": Case(
        ("MambaIR",), made("basicsr.archs.mambair_arch:MambaIR", **LIGHT, upsampler="pixelshuffledirect"), 64, 64
    ),
    "UltraLight-VM-UNet": Case(("UltraLight-VM-UNet",), made("models.UltraLight_VM_UNet:UltraLight_VM_UNet"), 256, 256),
    "Spatial-Mamba tiny": Case(
        ("Spatial-Mamba/classification", "Spatial-Mamba/kernels/dwconv2d"),
        made("models.spatialmamba:SpatialMamba", dims=[64, 128, 256, 512], d_state=1, depths=[2, 4, 8, 4]),
        224,
    ),
    "MobileMamba T2": Case(("MobileMamba",), made("model.mobilemamba.mobilemamba:MobileMamba_T2"), 192, 192),
    "VSSD micro": Case(("VSSD/classification",), made("models.mamba2:VMAMBA2", **VSSD, linear_attn_duality=True), 224),
    "VSSD micro, with its SSD scan": Case(
        ("VSSD/classification",), made("models.mamba2:VMAMBA2", **VSSD, linear_attn_duality=False), 224
    ),
    "EfficientViM M1": Case(("EfficientViM/classification",), made("models.EfficientViM:EfficientViM_M1"), 224),
    "mamba_ssm Mamba": Case(("mamba",), on_patches("mamba_ssm:Mamba", 64), 224),
    "mamba_ssm Mamba2": Case(("mamba",), on_patches("mamba_ssm:Mamba2", 64, d_state=32, headdim=16), 224),
}


def build(folder: str, case: str) -> nn.Module:
    """Make the network `case` from the clones in `folder`, with weights from a seed: the factory for --model."""
    found = CASES[case]
    sys.path[:0] = [str(Path(folder, each).resolve()) for each in found.folders]
    os.chdir(sys.path[0])  # MobileMamba looks for its files in the working directory
    module = found.make()
    seed(module)
    return module


@torch.no_grad()
def seed(module: nn.Module) -> None:
    """Fill a module with random weights with which every part matters: a small D, dt of 0.01 to 2, no scale near 0."""
    random = torch.Generator().manual_seed(0)
    for path, value in module.named_parameters():
        leaf, noise = path.rpartition(".")[2], torch.randn(value.shape, generator=random)
        if leaf.startswith("A_") or leaf == "A":
            continue
        if leaf.rstrip("s_b") == "D":
            value.copy_(0.1 * noise)
        elif leaf in ("dt_bias", "dt_projs_bias") or ("dt_proj" in path and leaf == "bias"):
            dt = torch.exp(torch.sigmoid(noise) * math.log(200)) / 100
            value.copy_(dt.expm1().log())
        elif leaf.endswith("bias"):
            value.copy_(0.1 * noise)
        elif value.dim() < 2:
            value.copy_(1 + 0.1 * noise)
        else:
            inputs = value[0].numel() if leaf == "weight" else value.shape[-1]
            value.copy_(noise / inputs**0.5)
