"""Everything an export was asked to do: one frozen value, complete before work starts."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from evm_deploy._util.text import one_of, size_text
from evm_deploy.bundle.manifest import Decision
from evm_deploy.data.preprocessing import MAX_SIDE
from evm_deploy.errors import UsageError
from evm_deploy.runtimes.base import Batch
from evm_deploy.toolchain.platforms import PLATFORMS

HEADS = ("logits", "probs", "features", "raw")
INPUTS = ("image", "tensor")
PRECISION_ALIASES = {"w8a16": "w8"}  # the field's name for int8 weights with float activations
PRECISIONS = ("fp32", "fp16", "int8", "int8-fp16", "w8")
CALIBRATED = ("int8", "int8-fp16")  # the second: what is not int8 is float16
QUANTIZED = (*CALIBRATED, "w8")
MIN_TARGETS = ("iOS16", "iOS17", "iOS18")
SCANS = ("auto", "plugin", "aot", "portable")
MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 18, 23, 20
# int8: gross faults, its gate is the accuracy. w8: right ones differ by 0.003 (trained T) to 0.016 (seeded T, S, B) in
# their logits, by up to 0.04 in feature maps; an error of 10 % is what accuracy without labels allows too
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.5, "int8-fp16": 0.5, "w8": 0.1}
# against the artifact's own outputs. int8: integer kernels differ by roundings. w8: computes in float32, as fp32
SELFTEST_TOLERANCES = {"int8": 0.05, "int8-fp16": 0.05, "w8": TOLERANCES["fp32"]}
CALIB_METHODS = ("minmax", "percentile", "mse", "entropy", "auto")
SMOOTHINGS = ("auto", "on", "off")
MAX_DROP = 1.0


@dataclass(frozen=True)
class ExportPlan:
    """The settings of one export to one target. None means: as the checkpoint says, else the default of the target.

    imgsz: (H, W) pixels; more_imgsz: further sizes that the same artifact takes (Core ML).
    tol: largest accepted difference from the float model, relative to max(1, largest output).
    mean, std: of channels scaled to 0..1. crop_pct: share of the resized image that the crop keeps.
    native_library: platform whose native library goes into the bundle. platform: platform that the artifact is for,
    None for any. chosen: target and precision, where a device profile decided them, and why. min_target: oldest system
    that must run it (Core ML).
    calib, calib_images, calib_method, force_calib: images to calibrate int8 with, how many of them, how ranges are
    read off, and whether unfit ones are taken; w8 is judged on them where there is no val. smooth: whether int8 makes
    the channels of activations alike first. val: labelled images to judge int8 and w8 with; max_drop: points of top-1
    that these may lose. settings: the target's own, `Target.settings`.
    """

    target: str
    precision: str | None = None
    imgsz: tuple[int, int] | None = None
    more_imgsz: tuple[tuple[int, int], ...] = ()
    batch: Batch = Batch(1, 1, 1)
    input: str = "image"
    head: str | None = None
    scan: str = "auto"
    native_library: str | None = None
    platform: str | None = None
    chosen: Decision | None = None
    min_target: str | None = None
    opset: int | None = None
    tol: float | None = None
    weights: str = "ema"
    labels: tuple[str, ...] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    calib: str | None = None
    calib_images: int = 512
    calib_method: str = "mse"
    smooth: str = "auto"
    force_calib: bool = False
    val: str | None = None
    max_drop: float | None = None
    settings: Any = None

    def __post_init__(self) -> None:
        if self.head is not None:
            one_of("--head", self.head, HEADS)
        one_of("--input", self.input, INPUTS)
        if self.precision is not None:
            object.__setattr__(self, "precision", canonical_precision(self.precision))
            one_of("--precision", self.precision, PRECISIONS)
        if self.min_target is not None:
            one_of("--min-target", self.min_target, MIN_TARGETS)
        one_of("--scan", self.scan, SCANS)
        self._check_calibration()
        if self.native_library is not None:
            one_of("--platform", self.native_library, PLATFORMS)
            if self.scan == "portable":
                raise UsageError(
                    f"--platform {self.native_library} with --scan portable: the model would not use the library",
                    "leave one of the two out",
                )
        if len({self.imgsz, *self.more_imgsz}) <= len(self.more_imgsz):
            raise UsageError("--imgsz names a size twice")
        one_of("--weights", self.weights, ("ema", "raw"))
        if self.opset is not None and not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise UsageError(f"--opset {self.opset}: supported are {MIN_OPSET} to {MAX_OPSET}")
        if self.tol is not None and not 0 < self.tol < 1:
            raise UsageError(f"--tol {self.tol}: use a number between 0 and 1")

    def _check_calibration(self) -> None:
        one_of("--calib-method", self.calib_method, CALIB_METHODS)
        one_of("--smooth", self.smooth, SMOOTHINGS)
        if self.precision in CALIBRATED and self.calib is None:
            raise UsageError(
                "int8 needs images to calibrate with", "add --calib DIR, 512 or so as the network will see"
            )
        given = [flag for flag, value in (("--calib", self.calib), ("--val", self.val)) if value is not None]
        if self.precision not in QUANTIZED and given:
            raise UsageError(
                f"{given[0]} is for int8 and w8, this export is {self.precision or 'float'}",
                "add --int8 or --precision w8, or leave it out",
            )
        if self.precision not in CALIBRATED and self.smooth == "on":
            raise UsageError(
                f"--smooth is for int8, this export is {self.precision or 'float'}", "add --int8, or leave it out"
            )
        if self.precision == "w8" and len(given) == 2:
            raise UsageError("--calib has no use for w8 beside --val: it calibrates nothing", "leave --calib out")
        if self.calib_images < 1:
            raise UsageError(f"--calib-images {self.calib_images}: use a number from 1")
        if self.max_drop is not None and self.val is None:
            raise UsageError("--max-drop needs labelled images to measure the drop with", "add --val DIR")
        if self.val is not None and self.head == "features":
            raise UsageError("--val with --head features: feature maps have no classes", "leave --val out")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop {self.max_drop}: use points of accuracy from 0 to 100")

    @property
    def tolerance(self) -> float:
        return self.tol if self.tol is not None else TOLERANCES[self.precision or PRECISIONS[0]]

    @property
    def sizes(self) -> str:
        """`224x224`, or `192x192+224x224` of several; of a plan that has been completed."""
        return "+".join(size_text(size) for size in (self.imgsz, *self.more_imgsz) if size)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for manifests and records."""
        return {**asdict(self), "batch": str(self.batch)}


def canonical_precision(name: str) -> str:
    """Return the precision that `name` is an alias of, such as w8 for w8a16; any other name unchanged."""
    return PRECISION_ALIASES.get(name, name)


def parse_imgsz(text: str | int) -> tuple[int, int]:
    """`224` or `HxW` -> (H, W) in pixels."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", str(text))
    if not match:
        raise UsageError(f"--imgsz {text!r}: use 224, or HxW such as 224x288")
    height, width = int(match[1]), int(match[2] or match[1])
    if max(height, width) > MAX_SIDE:
        raise UsageError(f"--imgsz {text}: at most {MAX_SIDE} pixels a side")
    return height, width
