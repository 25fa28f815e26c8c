"""Compare float32 forms of a public Mamba network with the same network in float64: what rounding does to its outputs.

    python -O benchmarks/family_rounding.py FOLDER NAME ..

FOLDER and NAME as for families.py. -O: some repositories assert that tensors are float32. The images are those of the
bundle's self-test, which the export compares too.
The script prints the largest difference from float64, relative to the scale of the output (at least 1), of torch in
float32, of torch in float32 with the Mamba-2 scans alone in float64, and of the ONNX and OpenVINO bundles, and the
difference below which 99 % of the outputs are.

If torch itself, or torch with exact scans, is as far from float64 as a bundle, then rounding of the network's other
layers decides, and no lowering of the scan can come closer. The last rows are the steps of torch in float32 that add
most to the rounding: the rms difference from float64 over the rms, before and after the step.
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
from evm_deploy.model.foreign.norms import gated_rms_norm

IMAGES, STEPS = 3, 5


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


@contextmanager
def recorded() -> Iterator[Callable[[torch.nn.Module], dict[str, tuple[Tensor, Tensor]]]]:
    """Context manager: a function that hooks a network, and returns input and output of its last call by step.

    Steps are modules, and the gated norm behind a Mamba-2 scan with the size of its smallest and largest token.
    """
    hooks: list[Any] = []
    norm = gated_rms_norm

    def watch(module: torch.nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        calls: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(path: str, x: Any, y: Any) -> None:
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                calls[path] = (x, y)

        def gated(y: Tensor, weight: Any, bias: Any, z: Tensor, *more: Any) -> Tensor:
            x, result = y * torch.nn.functional.silu(z), norm(y, weight, bias, z, *more)
            keep("gated norm", x, result)
            return result

        vars(ssd)["gated_rms_norm"] = gated
        hooks.extend(
            each.register_forward_hook(lambda _, x, y, path=path: keep(path, x[0] if x else None, y))
            for path, each in module.named_modules()
        )
        return calls

    try:
        yield watch
    finally:
        vars(ssd)["gated_rms_norm"] = norm
        for hook in hooks:
            hook.remove()


def rounding(value: Tensor, exact: Tensor) -> float:
    """Return the rms difference of two tensors over the rms of the exact one."""
    return float((value - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def print_steps(name: str, module: torch.nn.Module, x: Tensor) -> None:
    """Print the steps with the largest growth of rounding for one image (1, 3, H, W). The module becomes float64."""
    with recorded() as watch:
        single = watch(module)
        computed(module, x)
    with recorded() as watch, doubled():
        exact = watch(module.double())
        computed(module, x.double())
    grown = []
    for path in single.keys() & exact.keys():
        before, after = (rounding(a, b) for a, b in zip(single[path], exact[path], strict=True))
        grown.append((after - before, path or "network", before, after))
    for _, path, before, after in sorted(grown, reverse=True)[:STEPS]:
        print(f"{name:<18} {path:<45} {before:.1e} -> {after:.1e}")
    if "gated norm" in exact:
        sizes = exact["gated norm"][0].square().mean(-1).sqrt()
        print(f"{name:<18} tokens before the gated norm: rms {sizes.min():.2g} to {sizes.max():.2g}")


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
    print_steps(name, module.float(), x[:1])


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
