"""Compare float32 forms of a public Mamba network with the same network in float64: what rounding does to its outputs.

    python -O benchmarks/family_rounding.py FOLDER NAME ..

FOLDER and NAME as for families.py. -O: some repositories assert that tensors are float32. The images are those of the
bundle's self-test, which the export compares too.
The script prints the largest difference from float64, relative to the scale of the output (at least 1), of torch in
float32, of torch in float32 with the Mamba-2 scans alone in float64, and of the ONNX and OpenVINO bundles, and the
difference below which 99 % of the outputs are. If torch itself, or torch with exact scans, is as far from float64 as a
bundle, then rounding of the network's other layers decides, and no lowering of the scan can come closer.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import where
from family_cases import CASES, build
from torch import Tensor
from torch.overrides import TorchFunctionMode

import evm_deploy
from evm_deploy.bench.measurable import examples
from evm_deploy.export import ExportPlan, export
from evm_deploy.model import Network
from evm_deploy.model.foreign import foreign_code, ssd

IMAGES = 3


class Doubled(TorchFunctionMode):
    """Context manager: torch computes in float64 where code asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@contextmanager
def doubled() -> Iterator[None]:
    """Context manager: as Doubled, new tensors too."""
    torch.set_default_dtype(torch.float64)
    try:
        with Doubled():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def exact_scan(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Return a Mamba-2 scan that computes in float64 and rounds its results."""

    def exact(*args: Any, **kwargs: Any) -> Any:
        def wide(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) else value

        with doubled():
            found = scan(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})
        return tuple(each.float() for each in found) if isinstance(found, tuple) else found.float()

    return exact


def computed(module: torch.nn.Module, x: Tensor) -> np.ndarray:
    """Return the first output of a network for images (n, 3, H, W), one image at a time."""
    with torch.no_grad(), foreign_code():
        outputs = [module(each[None]) for each in x]
    return np.concatenate([(y if isinstance(y, Tensor) else next(iter(y))).numpy() for y in outputs])


def compare(folder: str, name: str) -> None:
    """Print the rows of one network."""
    size, here = CASES[name].size, Path.cwd()
    with evm_deploy.cpu_mamba():
        module = build(folder, name).eval().requires_grad_(False)
    os.chdir(here)
    network = Network.of(module, torch.rand(1, 3, size, size), name="network")
    found: dict[str, np.ndarray] = {}
    for target in ("onnx", "openvino"):
        plan = ExportPlan(target, "fp32", input="tensor", imgsz=(size, size), tol=1e-3)
        with tempfile.TemporaryDirectory() as out, evm_deploy.load(export(network, plan, out).path, threads=1) as model:
            images = examples(model, IMAGES)["tensor"]
            found[target] = np.concatenate([next(iter(model.run({"tensor": each[None]}).values())) for each in images])
    x = torch.from_numpy(images)
    found["torch"] = computed(module, x)
    ssd.calls.clear()
    with patch.object(ssd, "mamba_chunk_scan_combined", exact_scan(ssd.mamba_chunk_scan_combined)):
        exact = computed(module, x)
    if ssd.calls:
        found["torch, exact scans"] = exact
    with doubled():
        want = computed(module.double(), x.double())
    assert want.dtype == np.float64, want.dtype
    scale = max(1.0, np.abs(want).max())
    for form, outputs in found.items():
        far = np.abs(outputs - want) / scale
        print(f"{name:<18} {form:<20} {far.max():.1e}, 99 % below {np.quantile(far, 0.99):.1e}", flush=True)


def main() -> int:
    """Compare the networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(where())
    for name in args.names:
        compare(str(args.folder.resolve()), name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
