"""Embed networks of scenes: `python -m evm_deploy.demo.pack DETECTOR.pth SEGMENTER.pth`, as mmdet and mmseg save them.

The networks read scenes of 128x128 pixels as they are. Their weights are rounded to float16, which halves the package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from evm_deploy.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from evm_deploy.demo import CHECKPOINTS
from evm_deploy.demo.scenes import SIZE

UNUSED = {"detector": (), "segmenter": ("auxiliary_head.*",)}  # keys of weights that only training needs


def pack(checkpoint: Path, out: Path, drop: Sequence[str]) -> None:
    """Convert a checkpoint to float16, with its preprocessing. drop: keys that only training needs."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from evm_deploy.model.convert import convert

    convert(checkpoint, out, drop=drop, half=True, force=True)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    settings = {"imgsz": f"{SIZE}x{SIZE}", "resize": "stretch", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    save_file(load_file(out), out, metadata={**metadata, "evm_deploy": json.dumps(settings)})


def main() -> int:
    """Embed the two checkpoints that the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m evm_deploy.demo.pack", description="Embed networks of scenes.")
    for name in UNUSED:
        parser.add_argument(name, metavar=f"{name.upper()}.pth", help=f"checkpoint of the {name}")
    given = vars(parser.parse_args())
    for name, drop in UNUSED.items():
        checkpoint = given[name]
        pack(Path(checkpoint), CHECKPOINTS[name], drop)
        print(f"{CHECKPOINTS[name].name}: {CHECKPOINTS[name].stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
