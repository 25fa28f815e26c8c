"""Float network of a checkpoint in eager torch on the CPU: the baseline of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.cores import check_threads
from evm_deploy._util.files import sha256
from evm_deploy.bench.measurable import TORCH, repeated
from evm_deploy.bench.record import Settings
from evm_deploy.bundle.manifest import Decision
from evm_deploy.errors import UsageError
from evm_deploy.export.hub.graph import with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan, parse_imgsz
from evm_deploy.export.selftest import make_test_inputs
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import Batch
from evm_deploy.toolchain.plugins import find_plugin, kernel_isa


class FloatModel:
    """Float network of the checkpoint `path`, for images of size settings.imgsz or of the size saved with the weights.

    settings.weights and settings.drop say which of its weights are taken.
    Inside its `with` block torch uses settings.threads threads in the whole process. Raises CheckpointError, and
    UsageError for settings that torch does not have (end-to-end, scan, streams).
    """

    batch = Batch(1, 1, None)
    milliseconds: Mapping[str, float] = {}
    runs_on = "CPU"

    def __init__(self, path: Path, settings: Settings) -> None:
        if (settings.timed, settings.scan, settings.streams) != ("model", "auto", 1):
            raise UsageError(
                f"{path.name} is a checkpoint: torch only times its network, one inference at a time",
                "leave --end-to-end, --scan and --streams out, or torch out of --forms",
            )
        check_threads(settings.threads)
        network = load_checkpoint(
            path, weights=settings.weights or "ema", drop=settings.drop.split(",") if settings.drop else ()
        )
        self.spec = network.spec
        imgsz = parse_imgsz(settings.imgsz) if settings.imgsz else None
        plan, self.preprocessing = complete(ExportPlan("onnx", "fp32", imgsz=imgsz), self.spec)
        self.plan = replace(plan, target=TORCH)
        self.module = with_pre_and_postprocessing(network, self.plan, self.preprocessing)
        self.path, self.threads = path, settings.threads

    def facts(self) -> dict[str, Any]:
        """Return the checkpoint's data for `Record.bundle`."""
        return {
            "name": f"{self.spec.name}-{TORCH}-fp32-{self.plan.sizes}",
            "model": self.spec.name,
            "target": TORCH,
            "precision": "fp32",
            "imgsz": self.plan.imgsz,
            "manifest_sha256": sha256(self.path),
            "artifact_bytes": self.path.stat().st_size,
            "accuracy": None,
        }

    def runtime(self) -> dict[str, Any]:
        """Return torch's version, and whether and how scans run on the native kernel, for `Record.runtime`."""
        import torch

        library = find_plugin("onnxruntime")
        scan = (
            Decision("native", "eager, scans on the native kernel")
            if library
            else Decision("torch", "eager, scans in torch: no native kernel here")
        )
        isa = kernel_isa(library) if library else None
        return {"versions": {"torch": torch.__version__}, "scan": asdict(scan), "isa": isa, "plan": {}}

    def inference(self, batch: int, timed: str) -> Callable[[], object]:
        """Return the function to time: one run on `batch` seeded images."""
        pixels = repeated(make_test_inputs(self.plan, self.preprocessing), batch)
        return lambda: self.run(pixels)

    def run(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Run the network on images (n, H, W, 3) uint8 and return its outputs by name."""
        import torch

        with torch.inference_mode():
            values = self.module(torch.from_numpy(pixels))
        return {name: value.numpy() for name, value in zip(self.module.outputs, values, strict=True)}

    def stages(self) -> dict[str, float]:
        """Return {}: only the network is timed."""
        return {}

    def layers(self, batch: int) -> dict[str, Any]:
        """Return no times: the torch baseline is not profiled."""
        return {}

    def __enter__(self) -> FloatModel:
        import torch

        self.threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads or self.threads_before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        torch.set_num_threads(self.threads_before)
        del self.module
