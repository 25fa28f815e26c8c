"""Export networks of public Mamba repositories and measure them: the table of docs/families.md.

    python benchmarks/families.py FOLDER [NAME ..] [--targets onnx,openvino,coreml,trt] [-o families.json]

FOLDER holds a git clone of each repository under its own name, such as VMamba and LocalMamba. The packages that they
need beside torch (timm, einops, fvcore, pywavelets ..) have to be installed. The networks are the repositories' own
classes, mostly with fewer blocks than in the papers, and with random weights with which every part matters. Each is
exported in float32 by one `evm-export --model` to every target. The script prints a row for each network: differences
from the float model relative to the scale of the output, the median latency of the ONNX bundle with the portable scan
divided by that with the native kernel (one thread), or the message of evm-export. The JSON file has all figures.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import where
from torch import nn

from evm_deploy.export import ExportPlan

COMMANDS = Path(sys.executable).parent


@dataclass(frozen=True)
class Case:
    """A network of a repository.

    folders: for Python's path, below the folder of clones; the first one becomes the working directory. make: returns
    the module, of the repository's own classes, with fewer blocks than in the paper. size: side of the image in pixels.
    paper: that of the paper.
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
    "VMamba v05": Case(("VMamba/classification",), made("models.vmamba:VSSM", **VMAMBA, **V05), 112),
    "VMamba v0": Case(("VMamba/classification",), made("models.vmamba:VSSM", **VMAMBA, **V0), 112),
    "VMamba m2": Case(("VMamba/classification",), made("models.vmamba:VSSM", **VMAMBA, **M2), 112),
    "Vim": Case(("Vim/vim", "Vim/mamba-1p1p1"), made("models_mamba:VisionMamba", **VIM, **BIDIRECTIONAL), 64),
    "Vim, no mamba_ssm": Case(("Vim/vim",), made("models_mamba:VisionMamba", **VIM, **BIDIRECTIONAL), 64),
    "LocalVMamba": Case(
        ("LocalMamba/classification",), made("lib.models.local_vmamba:VSSM", **STAGES, directions=WINDOWS), 112
    ),
    "LocalVim": Case(("LocalMamba/classification",), local_vim, 64),
    "MedMamba": Case(("MedMamba",), made("MedMamba:VSSM", **STAGES, num_classes=6), 112),
    "VM-UNet": Case(("VM-UNet",), made("models.vmunet.vmunet:VMUNet", 3, 1, [1, 1, 1, 1], [1, 1, 1, 1]), 64, 256),
    "MambaIR": Case(
        ("MambaIR",), made("basicsr.archs.mambair_arch:MambaIR", **LIGHT, upsampler="pixelshuffledirect"), 64, 64
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
    ),
    "UltraLight-VM-UNet": Case(("UltraLight-VM-UNet",), made("models.UltraLight_VM_UNet:UltraLight_VM_UNet"), 128, 256),
    "Spatial-Mamba": Case(
        ("Spatial-Mamba/classification", "Spatial-Mamba/kernels/dwconv2d"),
        made("models.spatialmamba:SpatialMamba", **STAGES, d_state=1),
        112,
    ),
    "MobileMamba T2": Case(("MobileMamba",), made("model.mobilemamba.mobilemamba:MobileMamba_T2"), 192, 192),
    "VSSD": Case(("VSSD/classification",), made("models.mamba2:VMAMBA2", **VSSD, linear_attn_duality=True), 64),
    "VSSD, SSD": Case(("VSSD/classification",), made("models.mamba2:VMAMBA2", **VSSD, linear_attn_duality=False), 64),
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


# ------------------------------------------------------------------------------------------------------- measuring


def run(command: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Run a command in the folder of this file. Returns what it prints as JSON, as a list, and its errors."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    found = json.loads(done.stdout) if done.stdout else []
    return found if isinstance(found, list) else [found], done.stderr


def measured(folder: Path, name: str, targets: Sequence[str]) -> dict[str, Any]:
    """Export a network to every target, and measure the ONNX bundle with and without the native kernel."""
    case = CASES[name]
    clone = str(folder / Path(case.folders[0]).parts[0])
    commit = subprocess.run(
        ["git", "-C", clone, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=False
    )
    row: dict[str, Any] = {"commit": commit.stdout.strip()}
    with tempfile.TemporaryDirectory() as out:
        factory = ["--model", "families:build", "--model-arg", f"folder={str(folder)!r},case={name!r}"]
        options = [
            "--precision",
            "fp32",
            "--imgsz",
            str(case.size),
            "--target",
            ",".join(targets),
            "-o",
            out,
            "--json",
            "-q",
        ]
        found, errors = run([str(COMMANDS / "evm-export"), *factory, *options])
        for target, each in zip(targets, found or [{"error": errors}] * len(targets), strict=True):
            if "error" in each:
                row[target] = {"error": " ".join(each["error"].split())[-400:]}
                continue
            bundle = Path(each["bundle"])
            row[target] = {**facts(json.loads((bundle / "manifest.json").read_text(encoding="utf-8")))}
            if target == "onnx" and row[target]["scans"]:
                row["latency"] = {scan: latency(bundle, scan, out) for scan in ("plugin", "portable")}
    return row


def facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what the table says of a bundle: parity relative to the output's scale, nodes, scans and their share."""
    parity = manifest["parity"]
    scans = {each["name"]: each for each in parity["scans"]}.values()
    return {
        "parity": parity["max_abs"] / (parity["limit"] / ExportPlan(manifest["target"], "fp32").tolerance),
        "worst_scan": max((max(each["ssm"], each["probe"]) for each in scans), default=None),
        "share": [min(each["share"] for each in scans), max(each["share"] for each in scans)] if scans else [],
        "scans": len(scans),
        "nodes": manifest["details"].get("nodes") or manifest["details"].get("operations"),
        "parameters": manifest["model"]["parameters"],
        "notes": manifest["notes"],
    }


def latency(bundle: Path, scan: str, out: str) -> float:
    """Return the median latency of a bundle in ms, on one thread."""
    options = ["--scan", scan, "--threads", "1", "--limit", "20", "--json", "-q", "-o", out]
    found, errors = run([str(COMMANDS / "evm-bench"), str(bundle), *options])
    if not found:
        raise SystemExit(errors)
    return float(found[0]["p50"])


def line(name: str, row: dict[str, Any], targets: Sequence[str]) -> str:
    """Return a row of the table."""
    onnx, case, times = row.get("onnx", {}), CASES[name], row.get("latency")
    parities = [f"{row[each]['parity']:.0e}" if "parity" in row[each] else row[each]["error"] for each in targets]
    cells = [
        name,
        row["commit"],
        str(case.size) if case.size == case.paper else f"{case.size} ({case.paper})",
        onnx.get("scans", ""),
        "{:.2f} to {:.2f}".format(*onnx["share"]) if onnx.get("share") else "",
        onnx.get("nodes", ""),
        *parities,
        f"{times['portable'] / times['plugin']:.1f}" if times else "",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """Measure the networks and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--targets", default="onnx,openvino,coreml,trt")
    parser.add_argument("-o", "--out", type=Path, default=Path("families.json"))
    args = parser.parse_args()
    folder, out, targets = args.folder.resolve(), args.out.resolve(), args.targets.split(",")
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    head = ["network", "commit", "input", "scans", "share", "nodes", *targets, "portable / plugin"]
    print(where(), f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n", flush=True)
    for name in args.names or CASES:
        rows[name] = measured(folder, name, targets)
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(line(name, rows[name], targets), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
