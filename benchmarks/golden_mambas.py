"""Compare whole networks of public repositories with golden tensors made by their own slow scans.

    python benchmarks/golden_mambas.py FOLDER [--target onnx]

FOLDER: as for families.py, with Vim and VMamba in it. Golden tensors and the rule of their weights are those of
../shared/golden/any_mamba and ../shared/prototypes/any_mamba. The script prints, relative to the golden output, the
largest difference of the module in torch and of its bundle.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import where
from families import CASES

import evm_deploy
from evm_deploy.export import ExportPlan, export
from evm_deploy.model import Network
from evm_deploy.model.foreign import foreign_code

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = {"vim": "Vim", "vmamba": "VMamba v05"}  # file -> case


def main() -> int:
    """Print the differences of both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="onnx")
    args = parser.parse_args()
    sys.path.append(str(SHARED / "prototypes" / "any_mamba"))
    from seeding import seed_module

    print(where())
    for file, name in GOLDEN.items():
        golden = np.load(SHARED / "golden" / "any_mamba" / f"{file}.npz")
        sys.path[:0] = [str(args.folder.resolve() / each) for each in CASES[name].folders]
        with evm_deploy.cpu_mamba():
            module = CASES[name].make().eval()
        seed_module(module)
        shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
        assert shapes == json.loads(str(golden["shapes"])), f"{name} has other weights than {file}.npz"
        image, want = torch.from_numpy(golden["image"]), golden["output0"]
        with torch.no_grad(), foreign_code():
            in_torch = module(image).numpy()
        plan = ExportPlan(args.target, "fp32", input="tensor", imgsz=tuple(image.shape[2:]))
        with tempfile.TemporaryDirectory() as out:
            bundle = export(Network.of(module, image), plan, out)
            with evm_deploy.load(bundle.path) as model:
                exported = model.run({"tensor": golden["image"]})["logits"]
        torch_gap, gap = (np.abs(each - want).max() / np.abs(want).max() for each in (in_torch, exported))
        print(f"{name}: {int(golden['scans'])} scans, torch {torch_gap:.1e}, {args.target} {gap:.1e}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
