"""Measure memory and time of a segmenter's inference, with its logits compared in strips and as a whole.

    python benchmarks/segmenter.py [CHECKPOINT] [--imgsz 512] [--threads 1]

CHECKPOINT: a UPerNet of mmseg, by default the seeded UPerNet-T with 150 classes of tests/golden/detseg. `strips` is the
form of an export. `whole` resizes all logits and compares them, as mmseg does. `logits` stops before. Each form runs in
a process of its own: one inference to warm up, then three. Memory is the peak of the process (VmHWM) above its use
before the first inference. Needs Linux.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import where
from torch import nn

from evm_deploy.export.description import native_metadata
from evm_deploy.export.pipeline import built, complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.export.target import check_plan, native_library
from evm_deploy.export.targets import get_target
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import RunOptions
from evm_deploy.runtimes.registry import load_runtimes

ROOT = Path(__file__).resolve().parents[1]


class Whole(nn.Module):
    """Selection that resizes all logits; or none, for the logits themselves."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.size, self.outputs = size, ("label_map" if size else "logits",)

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor]:
        """Map logits (b, classes, h, w) -> a label map (b, H, W), or the logits."""
        if self.size is None:
            return (logits,)
        return (F.interpolate(logits, self.size, mode="bilinear").argmax(1).to(torch.uint8),)


def seeded(folder: Path) -> Path:
    """Write the seeded UPerNet-T."""
    sys.path.insert(0, str(ROOT / "tests" / "golden" / "detseg"))
    import detseg

    state = detseg.case("upernet_tiny_136x200").state
    path = folder / "upernet_tiny.pth"
    torch.save({"state_dict": {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}}, path)
    return path


def measure(path: Path, target: str, plugin: str, threads: int) -> None:
    """Run an artifact, and print peak memory in MB and the CPU time of an inference in seconds."""
    with load_runtimes()[target].open(
        path, RunOptions(threads=threads, plugin=Path(plugin) if plugin else None)
    ) as runtime:
        ((name, spec),) = runtime.inputs.items()
        feed = {name: np.random.default_rng(0).integers(0, 256, spec.shape, dtype=np.uint8)}
        before = status("VmRSS")
        runtime.run(feed)
        seconds = []
        for _ in range(3):
            start = time.process_time()
            runtime.run(feed)
            seconds.append(time.process_time() - start)
    print(f"{status('VmHWM') - before:6.0f} MB above {before:.0f}, {sorted(seconds)[1]:.2f} s of CPU")


def status(key: str) -> float:
    """Return a figure of this process in MB."""
    (kilobytes,) = re.findall(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) / 1024


def main() -> int:
    """Build every form, and measure each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--imgsz", default="512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        path, target, plugin = args.measure
        measure(Path(path), target, plugin, args.threads)
        return 0
    print(where())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        network = load_checkpoint(args.checkpoint or seeded(folder))
        selection = network.module.selection
        forms = {
            "strips": selection,
            "whole": lambda _, size: Whole(size),
            "logits": lambda _, size: Whole(None),
        }
        for form, choose in forms.items():
            network.module.selection = choose
            source = Source(network)
            for name in ("onnx", "openvino"):
                target = get_target(name)
                plan = check_plan(target, ExportPlan(name, "fp32", imgsz=args.imgsz))
                plan, preprocessing = complete(plan, network.spec)
                metadata = native_metadata(plan, network.spec, preprocessing)
                out = folder / form / name
                out.mkdir(parents=True)
                artifact = built(target, source.traced(target, plan, preprocessing, metadata), plan, out)
                plugin = native_library(target, artifact) or ""
                found = [str(artifact.path), name, str(plugin)]
                command = [sys.executable, __file__, "--threads", str(args.threads), "--measure", *found]
                print(
                    f"{form:7} {name:9}",
                    subprocess.run(command, capture_output=True, text=True).stdout.strip(),
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
