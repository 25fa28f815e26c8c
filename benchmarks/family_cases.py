"""Networks of public Mamba repositories, with seeded weights: the cases and the factory of benchmarks/families.py."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """A network of a repository.

    folders: for Python's path, below the folder of clones; the first one becomes the working directory. make: returns
    the module, of the repository's own classes, mostly with fewer blocks than in the paper. size: side of the image in
    pixels. paper: that of the paper. depth: blocks of each stage and width of the first one, with those of the
    repository's smallest network, or of its class, in brackets.
    """

    folders: tuple[str, ...]
    make: Callable[[], nn.Module]
    size: int
    paper: int = 224
    depth: str = "whole"


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


def local_vim() -> nn.Module:
    """Return LocalMamba's form of Vim, with windows."""
    found = importlib.import_module("lib.models.local_vim")
    module: nn.Module = found.VisionMamba(
        **VIM, if_rope=True, if_rope_residual=True, bimamba_type="v2", directions=WINDOWS, mamba_cls=found.MultiMamba
    )
    return module


VIM = {
    "img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "final_pool_type": "mean", "if_abs_pos_embed": True, "num_classes": 10,
}  # fmt: skip
BIDIRECTIONAL = {
    "bimamba_type": "v2", "if_cls_token": True, "if_divide_out": True, "use_middle_cls_token": True,
}  # fmt: skip
VMAMBA = {"depths": [1, 1, 2, 1], "dims": 48, "imgsz": 112}
V05 = {
    "ssm_d_state": 1, "ssm_ratio": 2.0, "ssm_conv_bias": False, "forward_type": "v05_noz", "mlp_ratio": 4.0,
    "downsample_version": "v3", "patchembed_version": "v2", "norm_layer": "ln2d",
}  # fmt: skip
V0 = {"ssm_d_state": 16, "forward_type": "v0", "mlp_ratio": 0.0, "downsample_version": "v1", "patchembed_version": "v1"}
M2 = {
    **V05, "ssm_d_state": 64, "ssm_ratio": 1.0, "ssm_act_layer": "gelu", "ssm_init": "v2", "forward_type": "m0_noz",
    "norm_layer": "ln",
}  # fmt: skip
WINDOWS = [
    ["h", "h_flip", "w7", "w7_flip"], ["h_flip", "v_flip", "w2", "w2_flip"],
    ["v", "v_flip", "w2_flip", "w7"], ["h", "v", "h_flip", "v_flip"],
]  # fmt: skip
VSSD = {
    "embed_dim": 48, "depths": [1, 1, 1, 1], "num_heads": [2, 4, 8, 16], "d_state": 48, "simple_downsample": False,
    "simple_patch_embed": False, "ssd_expansion": 2, "ssd_chunk_size": 256, "ssd_positve_dA": True,
    "attn_types": ["mamba2", "mamba2", "mamba2", "standard"],
}  # fmt: skip
LIGHT = {"img_size": 64, "embed_dim": 60, "d_state": 10, "depths": (1, 1), "mlp_ratio": 1.2, "upscale": 2}
STAGES = {"depths": [1, 1, 1, 1], "dims": [32, 64, 128, 256]}
CASES = {
    "VMamba v05": Case(
        ("VMamba/classification",),
        made("models.vmamba:VSSM", **VMAMBA, **V05),
        112,
        depth="1 1 2 1 x 48 (2 2 8 2 x 96)",
    ),
    "VMamba v0": Case(
        ("VMamba/classification",), made("models.vmamba:VSSM", **VMAMBA, **V0), 112, depth="1 1 2 1 x 48 (2 2 9 2 x 96)"
    ),
    "VMamba m2": Case(
        ("VMamba/classification",), made("models.vmamba:VSSM", **VMAMBA, **M2), 112, depth="1 1 2 1 x 48 (2 2 4 2 x 96)"
    ),
    "Vim": Case(
        ("Vim/vim", "Vim/mamba-1p1p1"),
        made("models_mamba:VisionMamba", **VIM, **BIDIRECTIONAL),
        64,
        depth="4 x 96 (24 x 192)",
    ),
    "Vim, no mamba_ssm": Case(
        ("Vim/vim",), made("models_mamba:VisionMamba", **VIM, **BIDIRECTIONAL), 64, depth="4 x 96 (24 x 192)"
    ),
    "LocalVMamba": Case(
        ("LocalMamba/classification",),
        made("lib.models.local_vmamba:VSSM", **STAGES, directions=WINDOWS),
        112,
        depth="1 1 1 1 x 32 (2 2 9 2 x 96)",
    ),
    "LocalVim": Case(("LocalMamba/classification",), local_vim, 64, depth="4 x 96 (20 x 128)"),
    "MedMamba": Case(
        ("MedMamba",), made("MedMamba:VSSM", **STAGES, num_classes=6), 112, depth="1 1 1 1 x 32 (2 2 4 2 x 96)"
    ),
    "VM-UNet": Case(
        ("VM-UNet",),
        made("models.vmunet.vmunet:VMUNet", 3, 1, [1, 1, 1, 1], [1, 1, 1, 1]),
        64,
        256,
        depth="1 1 1 1, 1 1 1 1 x 96 (2 2 2 2, 2 2 2 1 x 96)",
    ),
    "MambaIR": Case(
        ("MambaIR",),
        made("basicsr.archs.mambair_arch:MambaIR", **LIGHT, upsampler="pixelshuffledirect"),
        64,
        64,
        depth="1 1 x 60 (6 6 6 6 x 96)",
    ),
    "MambaIRv2": Case(
        ("MambaIR",),
        made(
            "basicsr.archs.mambairv2light_arch:MambaIRv2Light",
            img_size=64,
            upscale=2,
            embed_dim=48,
            depths=(1, 1),
            num_heads=(4, 4),
            window_size=16,
            d_state=8,
        ),
        64,
        64,
        depth="1 1 x 48 (6 6 6 6)",
    ),
    "UltraLight-VM-UNet": Case(("UltraLight-VM-UNet",), made("models.UltraLight_VM_UNet:UltraLight_VM_UNet"), 128, 256),
    "Spatial-Mamba": Case(
        ("Spatial-Mamba/classification", "Spatial-Mamba/kernels/dwconv2d"),
        made("models.spatialmamba:SpatialMamba", **STAGES, d_state=1),
        112,
        depth="1 1 1 1 x 32 (2 2 9 2 x 96)",
    ),
    "MobileMamba T2": Case(("MobileMamba",), made("model.mobilemamba.mobilemamba:MobileMamba_T2"), 192, 192),
    "VSSD": Case(
        ("VSSD/classification",),
        made("models.mamba2:VMAMBA2", **VSSD, linear_attn_duality=True),
        64,
        depth="1 1 1 1 x 48 (2 4 12 4 x 64)",
    ),
    "VSSD, SSD": Case(
        ("VSSD/classification",),
        made("models.mamba2:VMAMBA2", **VSSD, linear_attn_duality=False),
        64,
        depth="1 1 1 1 x 48 (2 4 12 4 x 64)",
    ),
    "EfficientViM M1": Case(("EfficientViM/classification",), made("models.EfficientViM:EfficientViM_M1"), 224),
    "mamba_ssm Mamba": Case(("mamba",), on_patches("mamba_ssm:Mamba", 64), 224, depth="one layer"),
    "mamba_ssm Mamba2": Case(
        ("mamba",), on_patches("mamba_ssm:Mamba2", 64, d_state=32, headdim=16), 224, depth="one layer"
    ),
}


def build(folder: str, case: str) -> nn.Module:
    """Make the network `case` from the clones in `folder`, with weights from a seed: the factory for --model."""
    found = CASES[case]
    sys.path[:0] = [str(Path(folder, each).resolve()) for each in found.folders]
    os.chdir(sys.path[0])  # MobileMamba looks for its files in the working directory
    torch.manual_seed(0)  # seed() leaves A as it was made; in Mamba2 that is random
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
